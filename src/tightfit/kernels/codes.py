"""The codes of tiles as tensors: the levels they stand for, and how they are packed (kernels/layout.py)."""

from __future__ import annotations

from functools import lru_cache

import torch

from tightfit.kernels.layout import PLANES, RUN, TILE_ROWS, code_count, float_bits

# The levels of QLoRA's 4-bit NormalFloat (https://arxiv.org/abs/2305.14314), as bitsandbytes has them.
# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


@lru_cache
def levels(kind: str, exponent: int) -> torch.Tensor:
    """The level of each code, (codes,) float32; for ternary the three levels, (32, 3)."""
    if kind == "nf4":
        return torch.tensor(NF4)
    if kind == "int8":
        return torch.arange(256, dtype=torch.uint8).view(torch.int8).float()
    if kind == "ternary":
        trits = torch.tensor([-1.0, 0.0, 1.0])
        numbers = torch.tensor([*range(14), 0, 0])  # a magnitude is at most 13
        return torch.cartesian_prod(trits, trits, trits)[torch.cat([13 + numbers, 13 - numbers])]
    bits = sum(PLANES[kind])
    if kind.startswith("int"):
        return torch.arange(1 << bits) - float(1 << (bits - 1))
    exponent_bits, mantissa_bits = float_bits(kind, exponent)
    codes = torch.arange(1 << (bits - 1))
    field, mantissa = codes >> mantissa_bits, codes % (1 << mantissa_bits)
    significand = (field > 0) + mantissa / (1 << mantissa_bits)  # the lowest exponent has no leading 1
    magnitudes = torch.ldexp(significand, field.clamp(min=1) + 1 - (1 << (exponent_bits - 1)))
    return torch.cat([magnitudes, -magnitudes])


def pack(codes: torch.Tensor, kind: str, out: torch.Tensor) -> None:
    """Writes ``codes`` (codes of a group, tiles, groups, 16), uint8, to ``out`` (tiles, groups, bytes of codes)."""
    count = code_count(kind, RUN) if kind == "ternary" else len(codes)
    runs = codes.unflatten(0, (-1, count))  # (runs, codes, tiles, groups, 16)
    start = shift = 0
    stored = out.unflatten(-1, (len(runs), -1))
    for bits in PLANES[kind]:
        plane = runs >> shift & ((1 << bits) - 1)
        end = start + TILE_ROWS * count * bits // 8
        if bits == 1:
            _pack_bits(plane, stored[..., start:end])
        else:
            _pack_fields(plane, bits, stored[..., start:end])
        start, shift = end, shift + bits


def _pack_fields(plane: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Several codes to a byte, 64 bytes to a line: ``plane`` (runs, codes, tiles, groups, 16) to ``out`` (tiles,
    groups, runs, bytes)."""
    places = plane.unflatten(1, (-1, 8 // bits, 4))  # (runs, lines, places in a byte, k, tiles, groups, 16)
    packed = places[:, :, 0].clone()
    for place in range(1, 8 // bits):
        packed |= places[:, :, place] << bits * place
    out.unflatten(-1, (-1, TILE_ROWS, 4)).copy_(packed.permute(3, 4, 0, 1, 5, 2))


def _pack_bits(plane: torch.Tensor, out: torch.Tensor) -> None:
    """Two rows by four codes to a byte, 8 bytes to a step; shapes as in :func:`_pack_fields`."""
    steps = plane.unflatten(-1, (-1, 2)).unflatten(1, (-1, 4))  # (runs, steps, k, tiles, groups, 8, rows of a byte)
    packed = torch.zeros_like(steps[:, :, 0, ..., 0])
    for k in range(4):
        for row in range(2):
            packed |= steps[:, :, k, ..., row] << 4 * row + k
    out.unflatten(-1, (-1, 8)).copy_(packed.permute(2, 3, 0, 1, 4))


def unpack(stored: torch.Tensor, kind: str, scratch: torch.Tensor, out: torch.Tensor) -> None:
    """The inverse of :func:`pack` for the tiles of 16 rows: ``stored`` (groups, bytes of codes), ``out`` (16, groups,
    codes of a group), int32. ``scratch`` is uint8, as many bytes as ``stored`` has."""
    count = code_count(kind, RUN) if kind == "ternary" else out.shape[-1]
    runs = out.zero_().unflatten(-1, (-1, count))  # (16, groups, runs, codes)
    lines = stored.unflatten(-1, (runs.shape[2], -1))  # (groups, runs, bytes)
    start = shift = 0
    for bits in PLANES[kind]:
        end = start + TILE_ROWS * count * bits // 8
        plane = lines[..., start:end]
        part = scratch[: plane.numel()].view(plane.shape)
        for place in range(0, 8, bits):
            torch.bitwise_right_shift(plane, place, out=part).bitwise_and_((1 << bits) - 1)
            if bits == 1:
                row, k = divmod(place, 4)
                target = runs.unflatten(-1, (-1, 4)).unflatten(0, (8, 2))[:, row, ..., k]  # (8, groups, runs, steps)
                target.add_(part.unflatten(-1, (-1, 8)).permute(3, 0, 1, 2), alpha=1 << shift)
            else:
                target = runs.unflatten(-1, (-1, 8 // bits, 4))[..., place // bits, :]  # (16, groups, runs, lines, k)
                target.add_(part.unflatten(-1, (-1, TILE_ROWS, 4)).permute(3, 0, 1, 2, 4), alpha=1 << shift)
        start, shift = end, shift + bits
