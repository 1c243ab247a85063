"""Reads rows of a GGUF file's quantised tensors: as numbers, or as tiles with the same codes."""

from __future__ import annotations

import torch

from tightfit.checkpoints.checkpoint import Checkpoint, TensorInfo
from tightfit.errors import CheckpointError
from tightfit.kernels import cpu, ggml

# The tiles that hold a type's codes. Of the K types, scales and offsets are rounded: they have more than a float16's 11
# bits.
FORMAT_OF = {
    "Q8_0": "int8(scales=f16)",
    "Q4_0": "int4(scales=f16)",
    "Q4_1": "int4(symmetric=false,scales=f16)",
    "Q5_0": "int5(scales=f16)",
    "Q5_1": "int5(symmetric=false,scales=f16)",
    "Q4_K": "int4(symmetric=false,scales=f16)",
    "Q5_K": "int5(symmetric=false,scales=f16)",
    "Q6_K": "int6(group=16,scales=f16)",
    "MXFP4": "fp4",
}
CONVERTED = ("Q4_K", "Q5_K", "Q6_K")
BY_TORCH = 16  # bytes that the reference takes for each number to make tiles


def read_numbers(
    checkpoint: Checkpoint, info: TensorInfo, expert: int, start: int, step: int, out: torch.Tensor
) -> None:
    """Fills ``out`` (n, cols), float32 and contiguous, with every ``step``-th row from ``start`` of the ``expert``-th
    matrix of a tensor. Scratch beside ``out``: at most twice as much."""
    stored = _read(checkpoint, info, expert, start, (len(out) - 1) * step + 1)
    ggml.decode(stored[::step].contiguous(), info.dtype, out)


def read_tiles(checkpoint: Checkpoint, info: TensorInfo, expert: int, start: int, rows: int, out: torch.Tensor) -> None:
    """Fills ``out``, uint8, with the tiles in the type's own format of ``rows`` rows from ``start``."""
    stored = _read(checkpoint, info, expert, start, rows)
    try:
        ggml.repack(stored, info.dtype, out)
    except CheckpointError as error:
        where = f"rows {start} to {start + rows - 1} of {info.name!r} of {checkpoint.name}"
        raise CheckpointError(f"{where}: {error.message}", error.hint) from error


def tiles_scratch(info: TensorInfo, rows: int) -> int:
    """Bytes that :func:`read_tiles` takes for a moment, at most, for ``rows`` rows."""
    stored = rows * _row_nbytes(info)
    return stored if cpu.available() else stored + BY_TORCH * rows * info.shape[-1]


def _row_nbytes(info: TensorInfo) -> int:
    kind = ggml.TYPES[info.dtype]
    return info.shape[-1] // kind.inputs * kind.nbytes


def _read(checkpoint: Checkpoint, info: TensorInfo, expert: int, start: int, count: int) -> torch.Tensor:
    """(count, bytes of a row): rows as they are stored."""
    stored = torch.empty(count, _row_nbytes(info), dtype=torch.uint8)
    checkpoint.read_into(info, (expert * info.shape[-2] + start) * stored.shape[1], stored.view(-1).numpy().data)
    return stored
