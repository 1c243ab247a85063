"""Torch reference of how numbers become tiles: the codes, and the scale of each group that loses least.

It defines the bytes; the compiled encoder writes the same. Everything is computed in float32, each operation rounded by
itself to nearest even (no fused multiply-add). ``rint`` rounds to the nearest whole number, halves to even; ``bf16``
rounds to the nearest bfloat16, halves to even, and limits to +-255/64. Tiles and codes are laid out as
:mod:`tightfit.kernels.layout` says.

**A group** is ``width`` inputs of one row: those of the tile, or in the last tile of a row what is left of the
columns. Inputs that only fill up the tile take no part in the search and get the code of t = +0 (below); rows that only
fill up the tile are rows of zeros. A sum over a group is eight partial sums, which start at 0, of the inputs i modulo
8, each in the order of the inputs; then partial sum j has j + 4 added (j < 4), then j + 2 (j < 2), then j + 1.

**Units.** With ``amax`` the largest magnitude of the group and k its exponent (the eight bits of the float32 number,
minus 127), limited to [-126, 126], the search is made on w = x * 2^-k, so that squares neither overflow nor vanish. The
scale and offset found are multiplied by 2^k; what is below 2^-126 then (the smallest normal number) becomes +0.

**Levels.** The level of w under the scale s and the offset o (0 unless asymmetric) is the nearest to t = (w - o) * r,
where r = 1 / s, or 0 if s is 0:

- intN: rint(t), limited to [-2^(N-1), 2^(N-1) - 1], for int8 to [-127, 127]; ternary: to [-1, 1].
- nf4: the code is the number of midpoints below t (strictly); midpoint i is (NF4[i] + NF4[i + 1]) / 2.
- fp4 (2 exponent bits) and fp8, with E exponent and M mantissa bits: a = min(|t|, LARGEST); e is the exponent of a (its
  eight bits minus 127), but at least 2 - 2^(E-1); n = rint(a * 2^(M-e)); the level is n * 2^(e-M) with the sign of t;
  the code is n + ((e - 2 + 2^(E-1)) << M), and the highest bit is the sign of t (that of a zero too).
  LARGEST is 6 for fp4, and for fp8 with E = 2, 3, 4, 5 it is 7.875, 31, 448 and 57344; 1 for nf4.

The codes that are stored are those of the scale that is stored: where it became 0, those of r = 0.

**The search** takes the scale with the smallest squared error: the sum over the group of d * d with
d = (w - o) - level * s. A later candidate replaces an earlier one only if its error is smaller.

1. s = bf16(base * (f / 64)) for each f of FACTORS, in order. The base is: for intN below 8 bits the largest number of
   the group if it is the largest magnitude, else the smallest, divided by the lowest code -2^(N-1); for int8
   amax / 127; for nf4, fp4 and fp8 amax / LARGEST; for ternary the mean magnitude, the sum of the magnitudes / width.
2. Twice: with q the levels under the best scale so far, s = bf16(sum(w * q) / sum(q * q)), or that scale again if the
   divisor is 0.

Asymmetric (intN only), with low and high half the smallest and half the largest w, middle = low + high, and [lowest,
highest] the range of codes:

1. For each positive f of FACTORS half = (high - low) * (f / 64);
   o = bf16(middle + half / (highest - lowest)), for int8, whose codes have a middle, o = bf16(middle);
   s = bf16(max((middle + half - o) / highest, (middle - half - o) / lowest)): rounding the offset costs no range.
2. Twice: with y = w - o under the best so far, sums Q of q, QQ of q * q, Y of y and YQ of y * q, and
   D = QQ * width - Q * Q: s' = bf16((YQ * width - Q * Y) / D), o' = bf16(o + (Y - s' * Q) / width), or s and o again
   if D is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tightfit.errors import CheckpointError
from tightfit.kernels import codes
from tightfit.kernels.layout import NUMBERS_BYTES, RUN, TILE_ROWS, code_nbytes, float_bits, limits, tile_nbytes

CHUNK_BYTES = 1 << 20  # of float32 numbers that are encoded at once; scratch is at most eight times that

# In 64ths of the base: first 1, then what lowers the error most on Gaussian, Laplace and Student-t groups of 16 numbers
# to whole rows, found greedily. A negative factor swaps the sides of levels that differ below and above 0. 96 lets fp4
# hold MXFP4's numbers exactly where a group lacks the largest.
FACTORS = {
    "int8": (64, 65, 66, 67, 69, 70),
    "int6": (64, 54, 68, 63, 66, 62, 73, 47, 60, 70),
    "int5": (64, 54, 68, 63, 66, 62, 73, 47, 60, 70),
    "int4": (64, 43, 58, 27, 52, 61, 71, 16, 36, 55),
    "int3": (64, 43, 58, 27, 52, 61, 71, 16, 36, 55),
    "int2": (64, 39, 23, 51, -50, 31, 16, 57, 45, -34),
    "nf4": (64, -60, -46, -64, 59, -91, 67, 62, -57, -38),
    "fp4": (64, 96, 58, 43, 61, 67, 54, 90, 36, 63),
    "fp8": (64, 90, 66, 76, 74, 65, 99, 71, 86),
    "ternary": (64, 107, 134, 95, 160, 119),
}
REFITS = 2
LARGEST_NUMBER = 255 / 64
SMALLEST_NORMAL = 2.0**-126


def encode(block: torch.Tensor, kind: str, group: int, asymmetric: bool, exponent: int, out: torch.Tensor) -> float:
    """Writes ``block`` (n, cols), of any floating type, to ``out`` as tiles; returns the sum of the squared errors.

    ``group`` is that of the tiles, above 0. ``exponent`` is the number of exponent bits of fp8, else without meaning.
    ``out`` is uint8, contiguous, as large as the tiles of n rows are. Raises CheckpointError for numbers that are not
    finite.
    """
    rows, cols = block.shape
    whole, groups = cols // group, -(-cols // group)
    search = Search(kind, asymmetric, exponent)
    stored = out.view(-1, groups, tile_nbytes(kind, group, asymmetric))
    step = max(CHUNK_BYTES // (4 * cols) // TILE_ROWS, 1) * TILE_ROWS
    error = 0.0
    for row in range(0, rows, step):
        part, tiles = block[row : row + step], stored[row // TILE_ROWS : (row + step) // TILE_ROWS]
        if whole:
            error += _encode(part[:, : whole * group], search, group, tiles[:, :whole])
        if whole < groups:
            error += _encode(part[:, whole * group :], search, group, tiles[:, whole:])
    return error


def not_finite() -> CheckpointError:
    return CheckpointError(
        "a weight is not a finite number", "The checkpoint is damaged; --weights bf16 keeps its values as they are."
    )


def _encode(block: torch.Tensor, search: Search, group: int, stored: torch.Tensor) -> float:
    """Encodes groups of one width, which may be less than ``group``, into ``stored`` (tiles, groups, bytes)."""
    tiles, groups, _ = stored.shape
    w = torch.zeros(block.shape[1] // groups, tiles, groups, TILE_ROWS)  # inputs first: sums are over them
    for tile in range(tiles):
        rows = block[tile * TILE_ROWS : (tile + 1) * TILE_ROWS]
        w[:, tile, :, : len(rows)] = rows.unflatten(1, (groups, -1)).permute(2, 1, 0)

    amax = w.amax(0).maximum(w.amin(0).neg_())
    if not amax.isfinite().all():
        raise not_finite()
    exponent = _exponent(amax).clamp_(-126, 126)
    w.mul_(_power(-exponent))
    best = search.best(w)

    unit = _power(exponent)
    scale, offset = _flushed(best.scale * unit), _flushed(best.offset * unit)
    t = torch.zeros(group, *amax.shape)
    t[: len(w)] = w.sub_(best.offset).mul_(_inverse(best.scale.where(scale != 0, 0.0)))
    codes.pack(search.codes(t), search.kind, stored[..., : code_nbytes(search.kind, group)])
    numbers = (scale, offset) if search.asymmetric else (scale,)
    stored[..., -NUMBERS_BYTES * len(numbers) :].view(torch.bfloat16).copy_(torch.cat(numbers, dim=-1))
    return float((best.error.double() * unit.double().square_()).sum())


@dataclass
class Fit:
    """A scale and offset of each group, and the sum of the squared errors with them: (tiles, groups, 16) each."""

    scale: torch.Tensor
    offset: torch.Tensor
    error: torch.Tensor

    def or_better(self, other: Fit) -> Fit:
        better = other.error < self.error
        return Fit(
            other.scale.where(better, self.scale),
            other.offset.where(better, self.offset),
            other.error.where(better, self.error),
        )


@dataclass(frozen=True)
class Search:
    """The levels of a kind, and the search for each group's scale. ``w`` is (width, tiles, groups, 16)."""

    kind: str
    asymmetric: bool
    exponent: int

    def best(self, w: torch.Tensor) -> Fit:
        candidates = self._ranges(w) if self.asymmetric else self._scales(w)
        best = self._fit(w, *next(candidates))
        for scale, offset in candidates:
            best = best.or_better(self._fit(w, scale, offset))
        for _ in range(REFITS):
            best = best.or_better(self._fit(w, *self._refit(w, best)))
        return best

    def _scales(self, w: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        low, high = w.amin(0), w.amax(0)
        amax = high.maximum(-low)
        if self.kind == "ternary":
            base = _sum(w.abs()) / len(w)
        elif self.kind == "int8":
            base = amax / 127
        elif self.kind.startswith("int"):
            base = high.where(high == amax, low) / limits(self.kind)[0]
        else:
            base = amax / self.largest
        for factor in FACTORS[self.kind]:
            yield _rounded(base * (factor / 64)), torch.zeros_like(base)

    def _ranges(self, w: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        lowest, highest = limits(self.kind)
        low, high = w.amin(0) / 2, w.amax(0) / 2
        middle = low + high
        for factor in FACTORS[self.kind]:
            if factor > 0:
                half = (high - low) * (factor / 64)
                offset = _rounded(middle if self.kind == "int8" else middle + half / (highest - lowest))
                above, below = middle + half - offset, middle - half - offset
                yield _rounded((above / highest).maximum(below / lowest)), offset

    def _refit(self, w: torch.Tensor, fit: Fit) -> tuple[torch.Tensor, torch.Tensor]:
        y = w - fit.offset
        q = self.levels(y * _inverse(fit.scale))
        squares, products = _sum(q * q), _sum(y.mul(q))
        if not self.asymmetric:
            return _rounded(products / squares).where(squares != 0, fit.scale), fit.offset
        y_sum, q_sum = _sum(y), _sum(q)
        divisor = squares * len(w) - q_sum * q_sum
        scale = _rounded((products * len(w) - q_sum * y_sum) / divisor).where(divisor != 0, fit.scale)
        offset = _rounded(fit.offset + (y_sum - scale * q_sum) / len(w)).where(divisor != 0, fit.offset)
        return scale, offset

    def _fit(self, w: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> Fit:
        y = w - offset
        q = self.levels(y * _inverse(scale))
        return Fit(scale, offset, _sum(y.sub_(q.mul_(scale)).square_()))

    def levels(self, t: torch.Tensor) -> torch.Tensor:
        """The level nearest to each number; ``t`` is used as scratch."""
        if self.kind == "nf4":
            return codes.levels("nf4", 0)[self._below(t).int()]
        if self.kind in ("fp4", "fp8"):
            steps, exponent = self._steps(t)
            return steps.mul_(_power(exponent - self._mantissa)).copysign_(t)
        return t.round_().clamp_(*limits(self.kind))

    def codes(self, t: torch.Tensor) -> torch.Tensor:
        """The codes of the levels nearest to ``t`` (inputs of a group, ...), which is used as scratch, in uint8."""
        if self.kind == "nf4":
            return self._below(t)
        if self.kind in ("fp4", "fp8"):
            steps, exponent = self._steps(t)
            magnitudes = steps.int().add_((exponent - self._lowest_exponent) << self._mantissa)
            return magnitudes.add_(t.signbit(), alpha=8 if self.kind == "fp4" else 128).byte()
        q = t.round_().clamp_(*limits(self.kind))
        if self.kind == "ternary":
            triples = q.unflatten(0, (-1, RUN // 12, 3, 4))
            v: torch.Tensor = (triples[:, :, 0] * 9 + triples[:, :, 1] * 3 + triples[:, :, 2]).flatten(0, 2)
            return v.abs().add_(v < 0, alpha=16).byte()
        if self.kind == "int8":
            return q.to(torch.int8).view(torch.uint8)
        return q.sub_(limits(self.kind)[0]).byte()

    @property
    def largest(self) -> float:
        """The largest level of nf4, fp4 and fp8, whose codes for NaN and infinity in float8_e4m3fn and float8_e5m2 are
        not used."""
        table = codes.levels(self.kind, self.exponent)
        unused = {("fp8", 4): 1, ("fp8", 5): 4}.get((self.kind, self.exponent), 0)
        return float(table[-1] if self.kind == "nf4" else table[len(table) // 2 - 1 - unused])

    @property
    def _mantissa(self) -> int:
        return float_bits(self.kind, self.exponent)[1]

    @property
    def _lowest_exponent(self) -> int:
        return 2 - (1 << (float_bits(self.kind, self.exponent)[0] - 1))

    def _below(self, t: torch.Tensor) -> torch.Tensor:
        """How many midpoints between the levels of nf4 lie below each number, in uint8."""
        table, below = codes.levels("nf4", 0), torch.zeros(t.shape, dtype=torch.uint8)
        for midpoint in (table[:-1] + table[1:]) / 2:
            below.add_(t > midpoint)
        return below

    def _steps(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest floating-point number to each magnitude: how many of the smallest steps of which exponent."""
        magnitudes = t.abs().clamp_(max=self.largest)
        exponent = _exponent(magnitudes).clamp_(min=self._lowest_exponent)
        return magnitudes.mul_(_power(self._mantissa - exponent)).round_(), exponent


def _sum(terms: torch.Tensor) -> torch.Tensor:
    """The sum over the first dimension, in the order that the module describes."""
    parts = torch.zeros(8, *terms.shape[1:])
    for start in range(0, len(terms), 8):
        part = terms[start : start + 8]
        parts[: len(part)].add_(part)
    for count in (4, 2, 1):
        parts[:count].add_(parts[count : 2 * count])
    return parts[0]


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return (1 / scale).masked_fill_(scale == 0, 0)


def _rounded(numbers: torch.Tensor) -> torch.Tensor:
    """To bfloat16, within the largest number that all units have."""
    return numbers.bfloat16().float().clamp_(-LARGEST_NUMBER, LARGEST_NUMBER)


def _flushed(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.masked_fill_(numbers.abs() < SMALLEST_NORMAL, 0)


def _exponent(magnitudes: torch.Tensor) -> torch.Tensor:
    """The exponents of float32 numbers that are not negative; -127 for subnormal ones."""
    return (magnitudes.view(torch.int32) >> 23).sub_(127)


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent, for exponents of normal numbers."""
    return exponent.add(127).bitwise_left_shift_(23).view(torch.float32)
