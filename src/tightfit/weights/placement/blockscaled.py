"""Weights that a checkpoint keeps as small codes with one scale for each block, decoded to float32 while they are read.

fp8 (DeepSeek-V3, https://arxiv.org/abs/2412.19437): float8 e4m3 numbers, one scale for a block of rows and columns.
MXFP4 (OCP Microscaling Formats 1.0, https://arxiv.org/abs/2310.10537): 4-bit floats e2m1, two in a byte, low half
first, and the exponent of a power of two for each group of 32.
"""

from __future__ import annotations

import math

import torch

from tightfit.checkpoints.checkpoint import Checkpoint, TensorInfo
from tightfit.checkpoints.quantization import Fp8Blocks, Mxfp4
from tightfit.errors import CheckpointError

SCALES = {"F32": torch.float32, "BF16": torch.bfloat16}  # in which fp8 checkpoints keep them
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
PAIRS = torch.tensor([(E2M1[byte & 15], E2M1[byte >> 4]) for byte in range(256)])  # (256, 2): the numbers of a byte
POWERS = torch.tensor([*(2.0 ** (byte - 127) for byte in range(255)), math.nan])  # e8m0


def is_coded(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    """Whether a tensor holds codes that mean something only together with their scales."""
    if isinstance(checkpoint.quantization, Fp8Blocks):
        return info.dtype == "F8_E4M3" and len(info.shape) > 1
    return isinstance(checkpoint.quantization, Mxfp4) and info.dtype == "U8" and info.name.endswith("_blocks")


def shape_of(checkpoint: Checkpoint, info: TensorInfo) -> tuple[int, ...]:
    """The shape of the numbers that a tensor of codes means. Raises CheckpointError unless its scales fit it."""
    if isinstance(checkpoint.quantization, Fp8Blocks):
        blocks = zip(info.shape[-2:], checkpoint.quantization.block, strict=True)
        shape, scales = info.shape, (*info.shape[:-2], *(-(-size // block) for size, block in blocks))
    else:
        shape, scales = (*info.shape[:-2], math.prod(info.shape[-2:]) * 2), info.shape[:-1]
    found = scales_of(checkpoint, info)
    types = SCALES if isinstance(checkpoint.quantization, Fp8Blocks) else ("U8",)
    if found.shape != scales or found.dtype not in types:
        raise CheckpointError(
            f"tensor {found.name!r} of {checkpoint.name} is {found.dtype} {list(found.shape)}; the weights that it "
            f"scales call for {' or '.join(types)} {list(scales)}",
            "The checkpoint is damaged, or quantised in another way than its config.json says: download it again.",
        )
    return shape


def scales_of(checkpoint: Checkpoint, info: TensorInfo) -> TensorInfo:
    """The tensor with the scales of a tensor of codes. Raises CheckpointError if it is missing."""
    if isinstance(checkpoint.quantization, Fp8Blocks):
        name = f"{info.name}_scale_inv"
    else:
        name = f"{info.name.removesuffix('_blocks')}_scales"
    if name not in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.name} has no tensor {name!r}, without which {info.name!r} cannot be decoded",
            "The checkpoint is incomplete: download it again.",
        )
    return checkpoint.tensors[name]


def read_rows(checkpoint: Checkpoint, info: TensorInfo, expert: int, start: int, step: int, out: torch.Tensor) -> None:
    """Fills ``out`` (n, cols), float32 and contiguous, with every ``step``-th row from ``start`` of the ``expert``-th
    matrix of a tensor of codes.

    Scratch beside ``out``: at most as much again for codes and indices, and as much again for scales.
    """
    if isinstance(checkpoint.quantization, Fp8Blocks):
        _read_fp8(checkpoint, info, checkpoint.quantization.block, expert, start, step, out)
    else:
        _read_mxfp4(checkpoint, info, expert, start, step, out)


def _read_fp8(
    checkpoint: Checkpoint,
    info: TensorInfo,
    block: tuple[int, int],
    expert: int,
    start: int,
    step: int,
    out: torch.Tensor,
) -> None:
    rows, cols = info.shape[-2:]
    span = (len(out) - 1) * step + 1
    codes = _rows(checkpoint, info, expert * rows + start, span, cols)
    out.copy_(codes.view(torch.float8_e4m3fn)[::step])

    first, last = start // block[0], (start + span - 1) // block[0]
    scales, (scale_rows, scale_cols) = scales_of(checkpoint, info), (-(-rows // block[0]), -(-cols // block[1]))
    dtype = SCALES[scales.dtype]
    raw = _rows(checkpoint, scales, expert * scale_rows + first, last - first + 1, scale_cols * dtype.itemsize)
    wide = raw.view(dtype).float().repeat_interleave(block[1], dim=1)[:, :cols]  # (rows of blocks, cols)
    row_of = torch.arange(start, start + span, step).div_(block[0], rounding_mode="floor").sub_(first)
    out.mul_(wide.index_select(0, row_of))


def _read_mxfp4(
    checkpoint: Checkpoint, info: TensorInfo, expert: int, start: int, step: int, out: torch.Tensor
) -> None:
    rows, groups, group_bytes = info.shape[-3:]
    span = (len(out) - 1) * step + 1
    codes = _rows(checkpoint, info, expert * rows + start, span, groups * group_bytes)[::step]
    torch.index_select(PAIRS, 0, codes.int().flatten(), out=out.view(-1, 2))
    exponents = _rows(checkpoint, scales_of(checkpoint, info), expert * rows + start, span, groups)[::step]
    scales = POWERS.index_select(0, exponents.int().flatten())
    out.view(len(out), groups, 2 * group_bytes).mul_(scales.view(len(out), groups, 1))


def _rows(checkpoint: Checkpoint, info: TensorInfo, start: int, count: int, row_bytes: int) -> torch.Tensor:
    """(count, row_bytes) uint8: rows of a tensor as they are stored, counted through all of its matrices."""
    raw = torch.empty(count, row_bytes, dtype=torch.uint8)
    checkpoint.read_into(info, start * row_bytes, raw.view(-1).numpy().data)
    return raw
