"""The quantised types of GGUF files (https://github.com/ggml-org/ggml): what their blocks mean, and the tiles with the
same codes.

A number is ``code * scale + offset``. Blocks of 32 have a float16 for each of the two (no offset where codes lie around
zero). The K types have 256 inputs to a block, and for each 32 (Q6_K: 16) of them a scale and an offset that are a
float16 of the block times a whole number. MXFP4 has codes that are floats, e2m1, and scales that are powers of two.

Tiles hold the same codes; scales and offsets too, in float16 (of MXFP4 in bfloat16), but those of the K types, which
have more bits, are rounded to nearest, halves to even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tightfit.errors import CheckpointError
from tightfit.kernels import codes, cpu
from tightfit.kernels.layout import NUMBERS_BYTES, TILE_ROWS, below_zero, code_nbytes, tile_nbytes


@dataclass(frozen=True)
class Type:
    """Blocks of ``inputs`` in ``nbytes``, and the tiles of their codes: ``kind``, inputs to a scale, and whether there
    are offsets."""

    inputs: int
    nbytes: int
    kind: str
    group: int = 32
    asymmetric: bool = False


TYPES = {
    "Q8_0": Type(32, 34, "int8"),
    "Q4_0": Type(32, 18, "int4"),
    "Q4_1": Type(32, 20, "int4", asymmetric=True),
    "Q5_0": Type(32, 22, "int5"),
    "Q5_1": Type(32, 24, "int5", asymmetric=True),
    "Q4_K": Type(256, 144, "int4", asymmetric=True),
    "Q5_K": Type(256, 176, "int5", asymmetric=True),
    "Q6_K": Type(256, 210, "int6", group=16),
    "MXFP4": Type(32, 17, "fp4"),
}


@dataclass(frozen=True)
class Codes:
    """Of n rows: ``codes`` (n, inputs) uint8 as tiles have them, and float32 ``scales`` and ``offsets`` (n, groups),
    exactly as the file means them. An offset is what code 0 stands for."""

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None


def unpack(stored: torch.Tensor, dtype: str) -> Codes:
    """The codes of rows (n, bytes of a row), uint8 and contiguous, of blocks of type ``dtype``."""
    blocks = stored.view(-1, TYPES[dtype].nbytes)
    found, scales, offsets = UNPACK[dtype](blocks)
    rows = len(stored)
    return Codes(found.reshape(rows, -1), scales.view(rows, -1), None if offsets is None else offsets.view(rows, -1))


def decode(stored: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
    """``out`` = the numbers of rows as in :func:`unpack`, (n, inputs) float32. Scratch: at most twice as much as it."""
    type, found = TYPES[dtype], unpack(stored, dtype)
    torch.index_select(_numbers(type), 0, found.codes.int().flatten(), out=out.view(-1))
    grouped = out.view(len(out), -1, type.group)
    grouped.mul_(found.scales.unsqueeze(-1))
    if found.offsets is not None:
        grouped.add_(found.offsets.unsqueeze(-1))


def _numbers(type: Type) -> torch.Tensor:
    """What each code stands for, in scales: from 0 on where there are offsets."""
    table = codes.levels(type.kind, 0)
    return table + below_zero(type.kind) if type.asymmetric else table


def repack(stored: torch.Tensor, dtype: str, out: torch.Tensor) -> None:
    """Writes rows as in :func:`unpack` to ``out`` as tiles: uint8, contiguous, as large as those of n rows are. Runs on
    the calling thread. Raises CheckpointError for scales and offsets that the tiles' type cannot hold."""
    type, (rows, nbytes) = TYPES[dtype], stored.shape
    blocks = nbytes // type.nbytes
    tiles = -(-rows // TILE_ROWS) * (blocks * type.inputs // type.group)
    if out.numel() != tiles * tile_nbytes(type.kind, type.group, type.asymmetric):
        raise ValueError(f"tiles of {rows} rows of {blocks} blocks in {dtype} do not take {out.numel()} bytes")
    if cpu.available():
        fits = cpu.module.repack(dtype, stored.data_ptr(), rows, blocks, out.data_ptr())
    else:
        fits = _repack(unpack(stored, dtype), type, out)
    if not fits:
        raise CheckpointError(
            "a scale does not fit into 16 bits", "The file is damaged, or needs --weights bf16 for its large numbers."
        )


def _repack(found: Codes, type: Type, out: torch.Tensor) -> bool:
    rows, inputs = found.codes.shape
    groups, tile_rows = inputs // type.group, -(-rows // TILE_ROWS)
    padding = tile_rows * TILE_ROWS - rows  # rows of zeros

    def tiled(numbers: torch.Tensor) -> torch.Tensor:
        """(rows, n) to (tiles, 16, n)."""
        return torch.cat([numbers, numbers.new_zeros(padding, numbers.shape[1])]).view(tile_rows, TILE_ROWS, -1)

    stored = out.view(tile_rows, groups, -1)
    nbytes = code_nbytes(type.kind, type.group)
    by_input = tiled(found.codes).unflatten(2, (groups, type.group)).permute(3, 0, 2, 1)  # (group, tiles, groups, 16)
    codes.pack(by_input, type.kind, stored[..., :nbytes])
    dtype = torch.bfloat16 if type.kind == "fp4" else torch.float16
    fits = True
    for place, numbers in enumerate((found.scales, found.offsets)):
        if numbers is not None:
            rounded = tiled(numbers).to(dtype).transpose(1, 2)  # (tiles, groups, 16)
            start = nbytes + place * NUMBERS_BYTES
            stored[..., start : start + NUMBERS_BYTES].view(dtype).copy_(rounded)
            fits = fits and bool(rounded.isfinite().all())
    return fits


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # codes, scales and offsets of each block


def _halves(stored: torch.Tensor) -> torch.Tensor:
    return stored.contiguous().view(torch.float16).float()


def _nibbles(stored: torch.Tensor, run: int) -> torch.Tensor:
    """(blocks, inputs): of each ``run`` bytes first the low halves, then the high ones."""
    both = stored.unflatten(1, (-1, 1, run))
    return torch.cat([both & 15, both >> 4], dim=2).flatten(1)


def _fifth_bits(stored: torch.Tensor) -> torch.Tensor:
    """(blocks, 32), 0 or 16: bit j of four bytes is that of input j."""
    return ((stored.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1) << 4).flatten(1)


def _q8_0(blocks: torch.Tensor) -> Parts:
    return blocks[:, 2:], _halves(blocks[:, :2]), None


def _q4_0(blocks: torch.Tensor) -> Parts:
    return _nibbles(blocks[:, 2:], 16), _halves(blocks[:, :2]), None


def _q4_1(blocks: torch.Tensor) -> Parts:
    return _nibbles(blocks[:, 4:], 16), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q5_0(blocks: torch.Tensor) -> Parts:
    return _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6]), _halves(blocks[:, :2]), None


def _q5_1(blocks: torch.Tensor) -> Parts:
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return codes, _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _six_bits(stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight offsets in 12 bytes: four of each in the lower six bits of the first bytes, whose upper
    bits belong to the others."""
    low, middle, both = stored.unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([low & 63, both & 15 | (low >> 6 << 4)], dim=1)
    return scales.float(), torch.cat([middle & 63, both >> 4 | (middle >> 6 << 4)], dim=1).float()


def _k_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales, offsets = _six_bits(blocks[:, 4:16])
    return scales.mul_(_halves(blocks[:, :2])), offsets.mul_(_halves(blocks[:, 2:4]).neg_())


def _q4_k(blocks: torch.Tensor) -> Parts:
    return _nibbles(blocks[:, 16:], 32), *_k_scales(blocks)


def _q5_k(blocks: torch.Tensor) -> Parts:
    # Bit j of byte i is that of input 32 * j + i.
    fifth = (blocks[:, 16:48].unsqueeze(1) >> torch.arange(8, dtype=torch.uint8).view(8, 1) & 1) << 4
    return _nibbles(blocks[:, 48:], 32) | fifth.flatten(1), *_k_scales(blocks)


def _q6_k(blocks: torch.Tensor) -> Parts:
    # Of each 128 inputs, bits 2j and 2j + 1 of byte i are those of input 32 * j + i.
    places = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    high = (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> places & 3) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return _nibbles(blocks[:, :128], 64) | high.flatten(1), scales.mul_(_halves(blocks[:, 208:])), None


def _mxfp4(blocks: torch.Tensor) -> Parts:
    exponents = blocks[:, :1].int()
    powers = torch.ldexp(torch.ones(exponents.shape), exponents - 127)
    return _nibbles(blocks[:, 1:], 16), powers.masked_fill_(exponents == 255, torch.nan), None


UNPACK = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "MXFP4": _mxfp4,
}
