"""Pruned rows (:mod:`tightfit.kernels.layout`): how matrices become them, compiled where that was built, and the torch
references of both directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import cpu
from tightfit.kernels.encode import TYPES
from tightfit.kernels.encode_reference import CHUNK_BYTES, not_finite
from tightfit.kernels.layout import TILE_ROWS, bitmap_nbytes, pruned_row_nbytes
from tightfit.kernels.weight import Weight

MAGNITUDE = 0x7FFF  # the bits of a bfloat16 without its sign, which have the order of magnitudes


def prune(block: torch.Tensor, kept: int, out: torch.Tensor) -> None:
    """Writes ``block`` (n, cols), of any floating type, to ``out`` as n pruned rows with room for ``kept`` values.

    Of each row as many of the largest magnitudes in bfloat16 stay, of equal ones the first; zeros lose their sign.
    ``out`` is uint8 and contiguous. Raises CheckpointError for numbers that are not finite, or not in bfloat16.
    """
    rows, cols = block.shape
    if out.numel() != rows * pruned_row_nbytes(cols, kept) or not out.is_contiguous():
        raise ValueError(f"{rows} x {cols} numbers, pruned, do not take {out.numel()} contiguous bytes")
    if not cpu.available():
        step = max(CHUNK_BYTES // (16 * cols), 1)
        for row in range(0, rows, step):
            _prune(block[row : row + step].bfloat16(), kept, out.view(rows, -1)[row : row + step])
        return
    if block.dtype not in TYPES or block.stride(1) != 1:
        block = block.float().contiguous()
    scratch = torch.empty(2, cols, dtype=torch.bfloat16)
    finite: bool = cpu.module.prune(
        TYPES[block.dtype],
        block.data_ptr(),
        block.stride(0),
        rows,
        cols,
        kept,
        out.data_ptr(),
        scratch.data_ptr(),
    )
    if not finite:
        raise not_finite()


def _prune(block: torch.Tensor, kept: int, out: torch.Tensor) -> None:
    """The reference: ``block`` (n, cols) in bfloat16, ``out`` (n, bytes of a row)."""
    if not block.isfinite().all():
        raise not_finite()
    (rows, cols), bitmap = block.shape, bitmap_nbytes(block.shape[1])
    padded = torch.zeros(rows, 8 * bitmap, dtype=torch.bfloat16)
    padded[:, :cols] = block
    magnitudes = padded.view(torch.int16) & MAGNITUDE
    largest = magnitudes.argsort(dim=1, descending=True, stable=True)[:, :kept]
    stays = torch.zeros_like(magnitudes, dtype=torch.bool).scatter_(1, largest, True)
    stays, padded = _interleaved(stays & (magnitudes != 0)), _interleaved(padded)
    places = stays.cumsum(1).sub_(1).masked_fill_(~stays, kept)  # the last is for those that go
    values = torch.zeros(rows, kept + 1, dtype=torch.bfloat16).scatter_(1, places, padded)
    out.zero_()
    for bit in range(8):
        out[:, :bitmap] |= stays[:, bit::8].byte() << bit
    out[:, bitmap : bitmap + 2 * kept].copy_(values[:, :kept].contiguous().view(torch.uint8))


def _interleaved(inputs: torch.Tensor) -> torch.Tensor:
    """Inputs (n, a multiple of 32) in the order of the bitmap's places."""
    return inputs.view(len(inputs), -1, 2, 16).transpose(2, 3).flatten(1)


@dataclass(frozen=True)
class Expansion:
    """Room to expand 16 pruned rows; ``inputs`` are the result."""

    bits: torch.Tensor  # (16, bytes of the bitmap, 8), uint8
    indices: torch.Tensor  # (16, bits), int64
    places: torch.Tensor  # (16, bits), bfloat16
    inputs: torch.Tensor  # the same in their own order

    @staticmethod
    def of(weight: Weight, ws: Workspace) -> Expansion:
        nbytes = bitmap_nbytes(weight.cols)
        return Expansion(
            ws.empty(TILE_ROWS, nbytes, 8, dtype=torch.uint8),
            ws.empty(TILE_ROWS, 8 * nbytes, dtype=torch.int64),
            ws.empty(TILE_ROWS, 8 * nbytes, dtype=torch.bfloat16),
            ws.empty(TILE_ROWS, 8 * nbytes, dtype=torch.bfloat16),
        )


def expand(weight: Weight, start: int, stop: int, expansion: Expansion) -> None:
    """``expansion.inputs[i]`` = row ``start + i`` of a pruned matrix, for at most 16 rows up to ``stop``."""
    stored, bitmap, rows = weight.data.view(weight.rows, -1)[start:stop], bitmap_nbytes(weight.cols), stop - start
    for bit in range(8):
        torch.bitwise_right_shift(stored[:, :bitmap], bit, out=expansion.bits[:rows, :, bit])
    bits = expansion.bits[:rows].flatten(1).bitwise_and_(1)
    indices, places = expansion.indices[:rows], expansion.places[:rows]
    torch.cumsum(bits, 1, out=indices).sub_(1).clamp_(0, weight.kept - 1)
    torch.gather(stored[:, bitmap:].view(torch.bfloat16), 1, indices, out=places)
    places.masked_fill_(bits.bitwise_xor_(1).view(torch.bool), 0)
    expansion.inputs[:rows].unflatten(1, (-1, 2, 16)).copy_(places.unflatten(1, (-1, 16, 2)).transpose(2, 3))
