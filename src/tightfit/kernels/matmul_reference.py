"""Torch references of the operations on stored matrices. They define the results; the compiled kernels must agree.

Scratch comes from the workspace, and what computes is an :func:`~tightfit.kernels.ops.op`, so that a dry run takes the
same scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels.codes import levels, unpack
from tightfit.kernels.layout import PLANES, TILE_ROWS, below_zero, code_count, code_nbytes, tile_nbytes
from tightfit.kernels.ops import op
from tightfit.kernels.pruned import Expansion, expand
from tightfit.kernels.weight import Weight

# Of decoded weights at a time. Near a core's second-level cache, and little beside any budget; for many tokens more,
# since libraries multiply by a few hundred rows at half the speed that they reach by a thousand.
BLOCK_BYTES, LARGE_BLOCK_BYTES = 4 << 20, 8 << 20
MANY_TOKENS = 256

# Below it 127 / amax would be infinite.
SMALLEST_AMAX = 2.0**-100

Activations: TypeAlias = Literal["int8", "float32"]
Decode: TypeAlias = Callable[[Weight, int, int, torch.Tensor, Workspace], None]


def block_rows(cols: int, itemsize: int, tokens: int = 1) -> int:
    """How many decoded rows are held at a time, to be multiplied with ``tokens``: a multiple of 16, at least 16."""
    room = LARGE_BLOCK_BYTES if tokens >= MANY_TOKENS else BLOCK_BYTES
    return max(room // (cols * itemsize) // TILE_ROWS, 1) * TILE_ROWS


def product_rows(weight: Weight, dtype: torch.dtype, tokens: int) -> int:
    """How many rows of a matrix are multiplied with ``tokens`` at once: as many as are decoded at a time, or, of one
    that is stored in ``dtype`` and not decoded, as many as have a product of that size."""
    stored = weight.dense()
    wide = tokens if stored is not None and stored.dtype == dtype else weight.cols
    return min(block_rows(wide, dtype.itemsize, tokens), weight.rows)


def blocks(
    weight: Weight, dtype: torch.dtype, ws: Workspace, decode: Decode, step: int | None = None
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """``(start, stop, W[start:stop] in dtype)`` for the whole matrix, from the top, one after the other in one scratch.

    ``step`` is how many rows at a time. A matrix that is stored in ``dtype`` is given where it lies.
    """
    step = step or block_rows(weight.cols, dtype.itemsize)
    stored = weight.dense()
    if stored is not None and stored.dtype == dtype:
        for start in range(0, weight.rows, step):
            stop = min(start + step, weight.rows)
            yield start, stop, stored[start:stop]
        return
    with ws.frame():
        scratch = ws.empty(min(step, weight.rows), weight.cols, dtype=dtype)
        for start in range(0, weight.rows, step):
            stop = min(start + step, weight.rows)
            decode(weight, start, stop, scratch[: stop - start], ws)
            yield start, stop, scratch[: stop - start]


def vector_matmul(
    x: torch.Tensor,
    weights: Sequence[Weight],
    out: torch.Tensor,
    ws: Workspace,
    activations: Activations = "float32",
    accumulate: float = 0.0,
) -> None:
    """``out = x @ W.T`` of each matrix, side by side, or with ``accumulate`` that many times as much added to ``out``.

    x is (tokens, cols) and out (tokens, rows of all), float32. One token at a time: a library's product would be
    faster, but its bits may depend on threads, shapes and alignment.
    """
    first = 0
    for weight in weights:
        columns = out[:, first : first + weight.rows]
        first += weight.rows
        with ws.frame():
            inputs = x
            if activations == "int8" and takes_int8(weight):
                inputs = ws.empty(*x.shape)
                quantize(x, activation_block(weight), inputs, ws)
            results = ws.empty(*columns.shape) if accumulate else columns
            products = ws.empty(min(block_rows(weight.cols, 4), weight.rows), weight.cols)
            for start, stop, block in blocks(weight, torch.float32, ws, decode_block):
                _multiply_each(block, inputs, products[: stop - start], results[:, start:stop])
            if accumulate:
                _add(columns, results, accumulate)


def takes_int8(weight: Weight) -> bool:
    """Whether a matrix is multiplied with activations in int8 where they are asked for."""
    return weight.kind in PLANES and weight.kind != "fp8"


def activation_block(weight: Weight) -> int:
    """How many inputs share a scale when activations are rounded to int8: 48 for ternary weights, else 32 or 16."""
    return 48 if weight.kind == "ternary" else 32 if weight.group % 32 == 0 else 16


def quantize(x: torch.Tensor, block: int, out: torch.Tensor, ws: Workspace) -> None:
    """``out`` = x (tokens, cols) rounded to 8 bits and back, in blocks of ``block`` inputs.

    With ``amax`` the largest magnitude of a block, codes are ``round(x * (127 / amax))``, to nearest even, and the
    scale is ``amax / 127``. A block without a number above SMALLEST_AMAX is zeros; one with a number that is not finite
    becomes NaN.
    """
    tokens, cols = x.shape
    with ws.frame():
        padded = ws.empty(tokens, -(-cols // block), block)
        scales, inverses = ws.empty(tokens, padded.shape[1], 1), ws.empty(tokens, padded.shape[1], 1)
        _quantize(x, padded, scales, inverses, out)


def decode_block(weight: Weight, start: int, stop: int, out: torch.Tensor, ws: Workspace) -> None:
    """``out = W[start:stop]``, (stop - start, cols), float32 or bfloat16 (rounded to nearest even)."""
    dense = weight.dense()
    if dense is not None:
        _copy(dense[start:stop], out)
        return
    if weight.kind == "pruned":
        with ws.frame():
            expansion = Expansion.of(weight, ws)
            for row in range(start, stop, TILE_ROWS):
                end = min(row + TILE_ROWS, stop)
                _expand(weight, row, end, expansion)
                _copy(expansion.inputs[: end - row, : weight.cols], out[row - start : end - start])
        return
    first, last = weight.row_offset + start, weight.row_offset + stop
    with ws.frame():
        scratch = TileScratch.of(weight, ws)
        for tile in range(first // TILE_ROWS, -(-last // TILE_ROWS)):
            _decode_tiles(weight, tile, scratch)
            top = tile * TILE_ROWS
            begin, end = max(first, top), min(last, top + TILE_ROWS)
            _copy(scratch.values[begin - top : end - top, : weight.cols], out[begin - first : end - first])


def decode_rows(weight: Weight, indices: torch.Tensor, out: torch.Tensor, ws: Workspace) -> None:
    """``out[i] = W[indices[i]]``: indices int64 (n,), out (n, cols) float32. Raises IndexError outside of the rows."""
    dense = weight.dense()
    with ws.frame():
        if dense is not None:
            scratch = ws.empty(len(indices), weight.cols, dtype=dense.dtype)
            _gather(dense, indices, scratch)
            _copy(scratch, out)
        elif weight.kind == "pruned":
            _gather_pruned(weight, indices, Expansion.of(weight, ws), out)
        else:
            _gather_tiles(weight, indices, TileScratch.of(weight, ws), out)


@dataclass(frozen=True)
class TileScratch:
    """Room to decode 16 rows of tiles."""

    codes: torch.Tensor  # (16, groups, codes of a group), int32
    planes: torch.Tensor  # as many bytes as the codes have in tiles
    levels: torch.Tensor  # (codes, levels of a code)
    values: torch.Tensor  # (16, padded cols)

    @staticmethod
    def of(weight: Weight, ws: Workspace) -> TileScratch:
        groups = -(-weight.cols // weight.group)
        codes = ws.empty(TILE_ROWS, groups, code_count(weight.kind, weight.group), dtype=torch.int32)
        planes = ws.empty(groups * code_nbytes(weight.kind, weight.group), dtype=torch.uint8)
        values = ws.empty(TILE_ROWS, groups * weight.group)
        return TileScratch(codes, planes, ws.empty(codes.numel(), values.numel() // codes.numel()), values)


@op
def _decode_tiles(weight: Weight, tile: int, scratch: TileScratch) -> None:
    """``values`` = the 16 rows of a row of tiles: levels times scales, plus offsets, in float32."""
    group, asymmetric = weight.group, weight.asymmetric
    groups = scratch.codes.shape[1]
    stored = weight.data.view(-1, groups, tile_nbytes(weight.kind, group, asymmetric))[tile]  # (groups, bytes)
    unpack(stored[:, : code_nbytes(weight.kind, group)], weight.kind, scratch.planes, scratch.codes)
    table = levels(weight.kind, weight.exponent)
    torch.index_select(table.view(len(table), -1), 0, scratch.codes.flatten(), out=scratch.levels)
    values = scratch.values.view(TILE_ROWS, groups, group)
    if weight.kind == "ternary":
        triples = scratch.levels.view(TILE_ROWS, groups, -1, 4, 3)  # 12 inputs: 4 codes, each of every fourth input
        values.unflatten(-1, (-1, 3, 4)).copy_(triples.transpose(-1, -2))
    else:
        values.copy_(scratch.levels.view(values.shape))
    dtype = torch.float16 if weight.half_scales else torch.bfloat16
    numbers = stored[:, code_nbytes(weight.kind, group) :].view(dtype).view(groups, -1, TILE_ROWS)
    scales = numbers[:, 0].T.unsqueeze(-1)  # (16, groups, 1)
    values.mul_(scales)
    if asymmetric:
        offsets = numbers[:, 1].T.unsqueeze(-1)
        values.add_(offsets + below_zero(weight.kind) * scales.float() if weight.half_scales else offsets)


@op
def _gather(dense: torch.Tensor, indices: torch.Tensor, out: torch.Tensor) -> None:
    torch.index_select(dense, 0, indices, out=out)


@op
def _gather_tiles(weight: Weight, indices: torch.Tensor, scratch: TileScratch, out: torch.Tensor) -> None:
    for i, index in enumerate(indices.tolist()):
        if not 0 <= index < weight.rows:
            raise IndexError(f"row {index} of a matrix of {weight.rows} rows")
        tile, row = divmod(weight.row_offset + index, TILE_ROWS)
        _decode_tiles(weight, tile, scratch)
        out[i].copy_(scratch.values[row, : weight.cols])


@op
def _expand(weight: Weight, start: int, stop: int, expansion: Expansion) -> None:
    expand(weight, start, stop, expansion)


@op
def _gather_pruned(weight: Weight, indices: torch.Tensor, expansion: Expansion, out: torch.Tensor) -> None:
    for i, index in enumerate(indices.tolist()):
        if not 0 <= index < weight.rows:
            raise IndexError(f"row {index} of a matrix of {weight.rows} rows")
        expand(weight, index, index + 1, expansion)
        out[i].copy_(expansion.inputs[0, : weight.cols])


@op
def _quantize(
    x: torch.Tensor, padded: torch.Tensor, scales: torch.Tensor, inverses: torch.Tensor, out: torch.Tensor
) -> None:
    cols = x.shape[1]
    flat = padded.flatten(1)
    flat[:, :cols].copy_(x)
    flat[:, cols:].zero_()
    torch.linalg.vector_norm(padded, torch.inf, dim=-1, keepdim=True, out=scales)
    scales.add_(torch.mul(scales, 0, out=inverses))  # infinite ones become NaN
    torch.threshold_(scales, SMALLEST_AMAX, 0.0)
    inverses.fill_(127).div_(scales).clamp_(max=torch.finfo(torch.float32).max)
    padded.mul_(inverses).round_().mul_(scales.div_(127))
    out.copy_(flat[:, :cols])


@op
def _copy(source: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(source)


@op
def _add(x_: torch.Tensor, y: torch.Tensor, scale: float) -> None:
    x_.add_(y, alpha=scale)


@op
def _multiply_each(block: torch.Tensor, x: torch.Tensor, products: torch.Tensor, out: torch.Tensor) -> None:
    """Sums by folding the upper half of the columns onto the lower, so that the order depends on their number only."""
    for token in range(len(x)):
        torch.mul(block, x[token], out=products)
        width = products.shape[1]
        while width > 1:
            half = (width + 1) // 2
            products[:, : width - half].add_(products[:, half:width])
            width = half
        out[token].copy_(products[:, 0])
