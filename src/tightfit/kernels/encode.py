"""How numbers become tiles: compiled where that was built, else the torch reference."""

from __future__ import annotations

import math

import torch

from tightfit.errors import CheckpointError
from tightfit.kernels import cpu
from tightfit.kernels import encode_reference as reference
from tightfit.kernels.encode_reference import not_finite
from tightfit.kernels.layout import TILE_ROWS, below_zero, code_nbytes, tile_nbytes

__all__ = ["encode", "not_finite", "scratch_bytes"]

LARGEST_MULTIPLE = 128  # that cols are filled up to a multiple of, in a group
TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def encode(block: torch.Tensor, kind: str, group: int, asymmetric: bool, exponent: int, out: torch.Tensor) -> float:
    """Writes ``block`` (n, cols), of any floating type, to ``out`` as tiles; returns the sum of the squared errors.

    ``group`` is that of the tiles, above 0. ``exponent`` is the number of exponent bits of fp8, else without meaning.
    ``out`` is uint8, contiguous, as large as the tiles of n rows are. Runs on the calling thread: several may encode at
    the same time. Raises CheckpointError for numbers that are not finite.
    """
    if not cpu.available():
        return reference.encode(block, kind, group, asymmetric, exponent, out)
    if block.dtype not in TYPES or block.stride(1) != 1:
        block = block.float().contiguous()
    rows, cols = block.shape
    tiles = -(-rows // TILE_ROWS) * -(-cols // group)
    if out.numel() != tiles * tile_nbytes(kind, group, asymmetric) or not out.is_contiguous():
        raise ValueError(f"tiles of {rows} x {cols} numbers do not take {out.numel()} contiguous bytes")
    scratch = torch.empty(cpu.module.encode_scratch(group))
    error: float = cpu.module.encode(
        kind,
        group,
        asymmetric,
        exponent,
        TYPES[block.dtype],
        block.data_ptr(),
        block.stride(0),
        rows,
        cols,
        out.data_ptr(),
        scratch.data_ptr(),
    )
    if math.isnan(error):
        raise not_finite()
    return error


def halve_scales(tiles: torch.Tensor, kind: str, group: int, asymmetric: bool) -> None:
    """Turns the scales and offsets of encoded intN from bfloat16 to float16 where they lie; an offset is that of the
    lowest code then. ``tiles`` is uint8. Raises CheckpointError for what float16 cannot hold."""
    stored = tiles.view(-1, tile_nbytes(kind, group, asymmetric))[:, code_nbytes(kind, group) :]
    numbers = stored.view(torch.bfloat16).float().view(len(stored), -1, TILE_ROWS)
    if asymmetric:
        numbers[:, 1].sub_(numbers[:, 0], alpha=below_zero(kind))
    halves = numbers.half()
    if not halves.isfinite().all():
        raise CheckpointError("a scale does not fit into float16", "Leave out scales=f16.")
    stored.view(torch.float16).copy_(halves.view(len(stored), -1))


def scratch_bytes(cols: int) -> int:
    """Bytes that :func:`encode` takes for a moment, at most, for a block of rows of ``cols`` numbers."""
    if cpu.available():
        return 4 * TILE_ROWS * (cols + LARGEST_MULTIPLE)
    return 8 * max(reference.CHUNK_BYTES, 4 * TILE_ROWS * cols)
