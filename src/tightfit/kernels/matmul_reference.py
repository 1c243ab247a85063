"""Torch references of the operations on stored matrices. They define the results; the compiled kernels must agree.

Scratch comes from the workspace, and what computes is an :func:`~tightfit.kernels.ops.op`, so that a dry run takes the
same scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels.ops import op
from tightfit.kernels.weight import DENSE, TILE_ROWS, Weight

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
    return weight.kind not in DENSE and weight.kind != "fp8"


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
    first, last = weight.row_offset + start, weight.row_offset + stop
    tile, tile_end = first // TILE_ROWS, -(-last // TILE_ROWS)
    with ws.frame():
        values, nibbles = _tile_scratch(weight, tile_end - tile, ws)
        _unpack(weight, tile, values, nibbles)
        _copy(values.flatten(0, 1)[first - tile * TILE_ROWS : last - tile * TILE_ROWS, : weight.cols], out)


def decode_rows(weight: Weight, indices: torch.Tensor, out: torch.Tensor, ws: Workspace) -> None:
    """``out[i] = W[indices[i]]``: indices int64 (n,), out (n, cols) float32. Raises IndexError outside of the rows."""
    dense = weight.dense()
    with ws.frame():
        if dense is not None:
            scratch = ws.empty(len(indices), weight.cols, dtype=dense.dtype)
            _gather(dense, indices, scratch)
            _copy(scratch, out)
        else:
            _gather_tiles(weight, indices, *_tile_scratch(weight, 1, ws), out)


def _tile_scratch(weight: Weight, tiles: int, ws: Workspace) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for decoded tiles (tiles, 16, padded cols), and for half of their codes where a byte holds two."""
    cols = -(-weight.cols // weight.group) * weight.group
    values = ws.empty(tiles, TILE_ROWS, cols)
    nibbles = ws.empty(tiles, TILE_ROWS, cols // 2 if weight.kind == "int4" else 0, dtype=torch.uint8)
    return values, nibbles


@op
def _unpack(weight: Weight, tile: int, values: torch.Tensor, nibbles: torch.Tensor) -> None:
    """``values`` = the row tiles from ``tile`` on, decoded: codes times scales, in float32."""
    tiles, _, cols = values.shape
    group, groups = weight.group, cols // weight.group
    row_tiles = -(-(weight.row_offset + weight.rows) // TILE_ROWS)
    stored = weight.data.view(row_tiles, groups, -1)[tile : tile + tiles]
    codes, scales = stored[..., : -2 * TILE_ROWS], stored[..., -2 * TILE_ROWS :].view(torch.bfloat16)
    if weight.kind == "int8":
        lines = codes.view(torch.int8).view(tiles, groups, group // 4, TILE_ROWS, 4).permute(0, 3, 1, 2, 4)
        values.view(tiles, TILE_ROWS, groups, group // 4, 4).copy_(lines)
    else:
        lines = codes.view(tiles, groups, group // 8, TILE_ROWS, 4).permute(0, 3, 1, 2, 4)
        halves, scratch = values.view(tiles, TILE_ROWS, groups, group // 8, 2, 4), nibbles.view(lines.shape)
        halves[..., 0, :].copy_(torch.bitwise_and(lines, 15, out=scratch))
        halves[..., 1, :].copy_(torch.bitwise_right_shift(lines, 4, out=scratch))
        values.sub_(8)
    values.view(tiles, TILE_ROWS, groups, group).mul_(scales.transpose(1, 2).unsqueeze(-1))


@op
def _gather(dense: torch.Tensor, indices: torch.Tensor, out: torch.Tensor) -> None:
    torch.index_select(dense, 0, indices, out=out)


@op
def _gather_tiles(
    weight: Weight, indices: torch.Tensor, values: torch.Tensor, nibbles: torch.Tensor, out: torch.Tensor
) -> None:
    for i, index in enumerate(indices.tolist()):
        if not 0 <= index < weight.rows:
            raise IndexError(f"row {index} of a matrix of {weight.rows} rows")
        tile, row = divmod(weight.row_offset + index, TILE_ROWS)
        _unpack(weight, tile, values, nibbles)
        out[i].copy_(values[0, row, : weight.cols])


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
