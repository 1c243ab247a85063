"""Reads rows of a parameter from a checkpoint, a block at a time: no tensor is ever held whole.

A block takes at most 2 MiB (more only where 16 rows are more). Beside it, rows that do not stand one after the other
take up to 2 MiB for a moment, decoding codes up to 4 MiB, and tensors that are stored transposed 1 MiB.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch

from tightfit.checkpoints.checkpoint import Checkpoint, TensorInfo
from tightfit.errors import CheckpointError
from tightfit.model.spec import ModelSpec, Param
from tightfit.weights.placement import blockscaled, ggml

BLOCK_BYTES = 2 << 20  # of rows read at once, large enough for a disk and small enough for a core's cache
SLAB_BYTES = 1 << 20  # of a transposed tensor read at once: all of it goes by for every block
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What a tensor is kept in that stays in its own precision. bfloat16 holds every number of MXFP4 exactly, and is what
# fp8 checkpoints were rounded from.
FORMAT_OF = {"F32": "f32", "F16": "f16", "BF16": "bf16", "F8_E4M3": "bf16", "U8": "bf16"}
FORMAT_OF |= ggml.FORMAT_OF
LAYER = re.compile(r"(.*?\blayers\.)([0-9]{1,9})\.")
TILE = 16  # rows: blocks that are encoded start at multiples of it


def tensor_of(checkpoint: Checkpoint, param: Param, expert: int = 0) -> TensorInfo:
    """The stored tensor that holds ``param``. Raises CheckpointError if it is missing, of another shape or type."""
    key = param.source.key.format(expert=expert)
    info = checkpoint.tensors.get(key)
    if info is None:
        raise CheckpointError(
            f"{checkpoint.name} has no tensor {key!r}, which its config.json calls for",
            "Compare config.json with the weights: they may belong to different models.",
        )
    if info.dtype not in DTYPES and (not _is_coded(checkpoint, info) or param.source.transposed):
        raise CheckpointError(
            f"tensor {key!r} of {checkpoint.name} has type {info.dtype}",
            f"Weights of type {', '.join(DTYPES)} can be opened, and block-scaled fp8 and mxfp4 where config.json "
            "declares them in 'quantization_config'.",
        )
    shape = _shape_of(checkpoint, info)
    if len(shape) != len(param.shape) + param.source.stacked:
        raise _shape_error(checkpoint, info, param)
    if param.source.stacked and shape[0] != param.experts:
        raise _shape_error(checkpoint, info, param)
    rows, *cols = _matrix(param, shape)
    if tuple(cols) != param.shape[1:] or rows < _end(param):
        raise _shape_error(checkpoint, info, param)
    return info


def check(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raises CheckpointError unless the checkpoint has every tensor of ``spec`` in its shape, no row of it unused, and
    no more layers than ``spec``."""
    ends: dict[str, int] = {}
    rows: dict[str, int] = {}
    for _, param in spec.all_params():
        for expert in range(1 if param.source.stacked else max(param.experts, 1)):
            info = tensor_of(checkpoint, param, expert)
            ends[info.name] = max(ends.get(info.name, 0), _end(param))
            rows[info.name] = _matrix(param, _shape_of(checkpoint, info))[0]
    for name, end in ends.items():
        if end < rows[name]:
            raise CheckpointError(
                f"tensor {name!r} of {checkpoint.name} has {rows[name]} rows, but config.json describes {end}",
                "Compare config.json with the weights: they may belong to different models.",
            )

    # Other towers have layers too; and those that predict further tokens (DeepSeek-V3) stand behind the model's.
    stacks = {match[1] for name in ends if (match := LAYER.match(name))}
    further = checkpoint.config.get("num_nextn_predict_layers")
    known = len(spec.layers) + (further if isinstance(further, int) else 0)
    for name in checkpoint.tensors:
        match = LAYER.match(name)
        if match and match[1] in stacks and int(match[2]) >= known:
            raise CheckpointError(
                f"{checkpoint.name} has tensor {name!r}, but config.json describes {len(spec.layers)} layers",
                "Compare config.json with the weights: they may belong to different models.",
            )

    # What a GGUF file holds beside what its architecture always has, such as biases, tells how it computes.
    unused = checkpoint.tensors.keys() - ends.keys() if checkpoint.is_gguf else ()
    if unused:
        raise CheckpointError(
            f"{checkpoint.name} has tensor {min(unused)!r}, which '{spec.family}' has no use for",
            "The file was written for another program: take another version of the model.",
        )


def _is_coded(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    """Whether a tensor holds codes of matrices."""
    return (info.dtype in ggml.FORMAT_OF and len(info.shape) > 1) or blockscaled.is_coded(checkpoint, info)


def _shape_of(checkpoint: Checkpoint, info: TensorInfo) -> tuple[int, ...]:
    """The shape of the numbers in a tensor."""
    return blockscaled.shape_of(checkpoint, info) if blockscaled.is_coded(checkpoint, info) else info.shape


def _matrix(param: Param, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, as we use it, of the matrix or vector that one expert has in a tensor of ``shape``."""
    one = shape[1:] if param.source.stacked else shape
    return one[::-1] if param.source.transposed else one


def _end(param: Param) -> int:
    """The row of the tensor after the last one that ``param`` takes."""
    return param.source.start + (param.shape[0] - 1) * param.source.step + 1


def _shape_error(checkpoint: Checkpoint, info: TensorInfo, param: Param) -> CheckpointError:
    one = list(param.shape[::-1] if param.source.transposed else param.shape)
    expected = [param.experts, *one] if param.source.stacked else one
    return CheckpointError(
        f"tensor {info.name!r} of {checkpoint.name} has shape {list(info.shape)}; config.json calls for {expected}",
        "Compare config.json with the weights: they may belong to different models.",
    )


def is_plain(param: Param, info: TensorInfo) -> bool:
    """Whether the numbers of ``param`` stand in the file as they are used, one row after the other."""
    return info.dtype in DTYPES and not param.source.transposed and param.source.step == 1


def is_stored_as(param: Param, info: TensorInfo, name: str) -> bool:
    """Whether the bytes of ``param`` in the format ``name`` stand in the file as they stand in memory."""
    return is_plain(param, info) and FORMAT_OF[info.dtype] == name


def has_codes_of(param: Param, info: TensorInfo, name: str) -> bool:
    """Whether the format ``name`` holds the codes that stand in the file."""
    return info.dtype in ggml.FORMAT_OF and param.source.step == 1 and FORMAT_OF[info.dtype] == name


def converted(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The types of a checkpoint's tensors whose numbers are not held exactly in what FORMAT_OF names."""
    tensors, compressed = checkpoint.tensors.values(), checkpoint.compressed
    types = compressed.types if compressed is not None else {info.dtype for info in tensors}
    return tuple(sorted(set(types) & set(ggml.CONVERTED)))


def read_tiles(checkpoint: Checkpoint, param: Param, expert: int, start: int, stop: int, out: torch.Tensor) -> None:
    """Fills ``out`` with the tiles of the rows [start, stop) of a parameter for which :func:`has_codes_of` holds."""
    info, source = tensor_of(checkpoint, param, expert), param.source
    ggml.read_tiles(checkpoint, info, expert if source.stacked else 0, source.start + start, stop - start, out)


def tiles_scratch(checkpoint: Checkpoint, param: Param) -> int:
    """Bytes that :func:`read_tiles` takes for a moment for as many rows as make a block."""
    return ggml.tiles_scratch(tensor_of(checkpoint, param), block_rows(checkpoint, param))


def read_plain(checkpoint: Checkpoint, param: Param, expert: int, start: int, out: torch.Tensor) -> None:
    """Fills ``out`` (contiguous, whole rows) with the bytes from row ``start`` of a parameter for which
    :func:`is_plain` holds."""
    info = tensor_of(checkpoint, param, expert)
    row_bytes = math.prod(param.shape[1:]) * DTYPES[info.dtype].itemsize
    read_bytes(checkpoint, param, expert, start * row_bytes, out.view(-1).view(torch.uint8))


def read_bytes(
    checkpoint: Checkpoint, param: Param, expert: int, start: int, out: torch.Tensor, again: bool = False
) -> None:
    """Fills ``out`` (uint8) with the bytes from ``start`` on of a parameter for which :func:`is_plain` holds. ``again``
    is as in :meth:`~tightfit.checkpoints.checkpoint.Checkpoint.read_into`."""
    info = tensor_of(checkpoint, param, expert)
    row_bytes = math.prod(param.shape[1:]) * DTYPES[info.dtype].itemsize
    begin = _expert_byte(param, info, expert) + param.source.start * row_bytes + start
    checkpoint.read_into(info, begin, _bytes(out), again)


def block_nbytes(checkpoint: Checkpoint, param: Param, expert: int = 0) -> int:
    """Bytes of a whole block."""
    return block_rows(checkpoint, param, expert) * _row_bytes(checkpoint, param, expert)


def block_rows(checkpoint: Checkpoint, param: Param, expert: int = 0) -> int:
    """How many rows of a parameter make a block: a multiple of 16, or all of them."""
    return min(param.shape[0], max(TILE, BLOCK_BYTES // _row_bytes(checkpoint, param, expert) // TILE * TILE))


def block_scratch(checkpoint: Checkpoint, param: Param) -> int:
    """Bytes that reading a block takes for a moment, the block included."""
    info, source = tensor_of(checkpoint, param), param.source
    block = block_nbytes(checkpoint, param)
    if source.transposed:
        return block + max(SLAB_BYTES, info.shape[-1] * DTYPES[info.dtype].itemsize)
    if info.dtype not in DTYPES:
        return 3 * block  # scales as wide as the block, codes, and what they index
    return block * (1 if source.step == 1 else 1 + source.step)


def _row_bytes(checkpoint: Checkpoint, param: Param, expert: int = 0) -> int:
    info = tensor_of(checkpoint, param, expert)
    return math.prod(param.shape[1:]) * (DTYPES[info.dtype].itemsize if info.dtype in DTYPES else 4)


def blocks(
    checkpoint: Checkpoint,
    param: Param,
    expert: int,
    start: int = 0,
    stop: int | None = None,
    memory: torch.Tensor | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, block) over the rows [start, stop) of a matrix or vector. A block is (n, cols), for vectors (n, 1),
    in the tensor's own type or, if that is a code, in float32. It is valid until the next one is asked for.

    ``memory`` is where they lie one after the other: uint8, at least :func:`block_nbytes` long.
    """
    at_once, end = block_rows(checkpoint, param, expert), param.shape[0] if stop is None else stop
    if memory is None:
        memory = torch.empty(block_nbytes(checkpoint, param, expert), dtype=torch.uint8)
    for row in range(start, end, at_once):
        yield row, _read_block(checkpoint, param, expert, row, min(row + at_once, end), memory)


def _read_block(
    checkpoint: Checkpoint, param: Param, expert: int, start: int, stop: int, memory: torch.Tensor
) -> torch.Tensor:
    info, source = tensor_of(checkpoint, param, expert), param.source
    coded = info.dtype not in DTYPES
    numbers = memory[: (stop - start) * _row_bytes(checkpoint, param, expert)]
    block = numbers.view(torch.float32 if coded else DTYPES[info.dtype]).view(stop - start, -1)
    first = source.start + start * source.step
    if source.transposed:
        _read_transposed(checkpoint, info, _expert_byte(param, info, expert), first, source.step, block)
    elif info.dtype in ggml.FORMAT_OF:
        ggml.read_numbers(checkpoint, info, expert if source.stacked else 0, first, source.step, block)
    elif coded:
        blockscaled.read_rows(checkpoint, info, expert if source.stacked else 0, first, source.step, block)
    else:
        _read_rows(checkpoint, info, _expert_byte(param, info, expert), first, source.step, block)
    return block


def _read_rows(checkpoint: Checkpoint, info: TensorInfo, base: int, start: int, step: int, out: torch.Tensor) -> None:
    """``out`` = every ``step``-th row from ``start`` of the matrix that begins at byte ``base``."""
    span = (len(out) - 1) * step + 1
    lines = out if step == 1 else torch.empty(span, out.shape[1], dtype=out.dtype)
    # The rows between are another parameter's.
    checkpoint.read_into(info, base + start * out.shape[1] * out.element_size(), _bytes(lines), again=step != 1)
    if step != 1:
        out.copy_(lines[::step])


def _read_transposed(
    checkpoint: Checkpoint, info: TensorInfo, base: int, start: int, step: int, out: torch.Tensor
) -> None:
    """The same of the matrix whose columns stand one after the other from byte ``base``: gathered from slabs of whole
    lines, which go through all of the tensor."""
    (rows, cols), width = out.shape, info.shape[-1]
    line_bytes = width * out.element_size()
    slab = torch.empty(min(cols, max(SLAB_BYTES // line_bytes, 1)), width, dtype=out.dtype)
    for line in range(0, cols, len(slab)):
        lines = slab[: min(len(slab), cols - line)]
        checkpoint.read_into(info, base + line * line_bytes, _bytes(lines), again=True)
        out[:, line : line + len(lines)] = lines[:, start : start + (rows - 1) * step + 1 : step].T


def _expert_byte(param: Param, info: TensorInfo, expert: int) -> int:
    """Where the matrix of ``expert`` begins in a tensor."""
    return info.nbytes // info.shape[0] * expert if param.source.stacked else 0


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data
