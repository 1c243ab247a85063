"""Products with stored matrices: a vector kernel for decoding, gemm for prefill, and the decoding of rows.

The vector kernel computes each token's row in a fixed order of its own, so its bits depend neither on the number of
tokens nor on threads. Gemm decodes the matrix block by block into scratch and multiplies there: compiled for AMX, else
with torch's products. The compiled kernels are used where they are found, else the references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import cpu
from tightfit.kernels import matmul_reference as reference
from tightfit.kernels.matmul_reference import Activations
from tightfit.kernels.ops import op
from tightfit.kernels.weight import DENSE, Joined, Weight

SMALLEST_BUCKET = 16


class Rows(Protocol):
    """Which rows of a flat list of tokens are multiplied how (:class:`tightfit.weights.formats.base.Split`)."""

    @property
    def vector(self) -> int: ...

    @property
    def gemm(self) -> Sequence[tuple[int, int]]: ...


def bucket(n: int) -> int:
    """The number of rows that a gemm over ``n`` tokens is padded to: a power of two, at least 16."""
    return max(1 << (n - 1).bit_length(), SMALLEST_BUCKET)


def matmul(
    x: torch.Tensor,
    weights: Weight | Joined,
    out: torch.Tensor,
    ws: Workspace,
    split: Rows | None,
    dtype: torch.dtype,
    activations: Activations,
    accumulate: float,
) -> None:
    """``out = x @ W.T``, or ``out += accumulate * (x @ W.T)``: the first ``split.vector`` tokens by
    :func:`vector_matmul`, the ranges ``split.gemm`` by :func:`gemm`; all by the former where ``split`` is None."""
    vector = x.shape[0] if split is None else split.vector
    if vector == x.shape[0]:
        vector_matmul(x, weights, out, ws, activations=activations, accumulate=accumulate)
        return
    if vector:
        vector_matmul(x[:vector], weights, out[:vector], ws, activations=activations, accumulate=accumulate)
    if split is not None and split.gemm:
        gemm(x, weights, out, split.gemm, dtype, ws, accumulate)


def vector_matmul(
    x: torch.Tensor,
    weights: Weight | Joined,
    out: torch.Tensor,
    ws: Workspace,
    *,
    activations: Activations = "float32",
    accumulate: float = 0.0,
) -> None:
    """``out = x @ W.T``, or with ``accumulate`` not zero ``out += accumulate * (x @ W.T)``.

    ``x`` is (tokens, cols) and ``out`` (tokens, rows), float32 with any row stride; of joined matrices ``out`` has the
    products one after the other. ``activations="int8"`` rounds x to 8 bits as
    :func:`tightfit.kernels.matmul_reference.quantize` does, for all kinds of tiles but fp8.
    """
    tokens = x.shape[0]
    x_stride, out_stride = _check(x, (tokens, weights.cols)), _check(out, (tokens, weights.rows))
    if not cpu.available():
        reference.vector_matmul(x, weights.weights, out, ws, activations, accumulate)
        return
    int8 = activations == "int8"
    with ws.frame():
        scratch = ws.empty(weights.product.scratch_nbytes(tokens, int8), dtype=torch.uint8)
        _vector_matmul(weights.product, x, tokens, x_stride, out, out_stride, accumulate, int8, scratch)


def decode_block(weight: Weight, start: int, stop: int, out: torch.Tensor, ws: Workspace) -> None:
    """``out = W[start:stop]``, (stop - start, cols), float32 or bfloat16 (rounded to nearest even), any row stride."""
    _check(out, (stop - start, weight.cols), out.dtype)
    if cpu.available() and weight.kind not in DENSE:
        _decode_block(weight, start, stop, out)
    else:
        reference.decode_block(weight, start, stop, out, ws)


def decode_rows(weight: Weight, indices: torch.Tensor, out: torch.Tensor, ws: Workspace) -> None:
    """``out[i] = W[indices[i]]``: indices int64 (n,), out (n, cols) float32 with any row stride.

    Raises IndexError for an index outside of the rows.
    """
    _check(indices, (len(indices),), torch.int64)
    _check(out, (len(indices), weight.cols))
    if cpu.available() and weight.kind not in DENSE:
        _decode_rows(weight, indices, out)
    else:
        reference.decode_rows(weight, indices, out, ws)


def gemm(
    x: torch.Tensor,
    weights: Weight | Joined,
    out: torch.Tensor,
    ranges: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    ws: Workspace,
    accumulate: float = 0.0,
) -> None:
    """``out[a:b] = x[a:b] @ W.T`` for each (a, b) of ``ranges``, computed in ``dtype``, or with ``accumulate`` not zero
    ``out[a:b] += accumulate * (x[a:b] @ W.T)``.

    ``dtype`` is bfloat16, float32, or int8: that is :func:`vector_matmul` with activations in int8, which has the bits
    of decoding, and float32 for matrices that it would not round them for.

    Bfloat16 is compiled, where the processor multiplies it by AMX: a token's bits depend on that token only. All else
    are torch's products, whose bits may depend on the number of tokens: each range is padded to its bucket, and a
    matrix is decoded once for all of them, a block of rows at a time; one that is stored in ``dtype`` is used where it
    lies.
    """
    if dtype == torch.int8:
        _int8_gemm(x, weights, out, ranges, ws, accumulate)
        return
    if dtype == torch.bfloat16 and cpu.has_gemm():
        for start, stop in _joined_ranges(ranges):
            _compiled_gemm(x[start:stop], weights, out[start:stop], ws, accumulate)
        return
    with ws.frame():
        padded = []
        for start, stop in ranges:
            padded.append(ws.empty(bucket(stop - start), weights.cols, dtype=dtype))
            _pad(x[start:stop], padded[-1])
        most, row = max(map(len, padded)), 0
        for weight in weights.weights:
            with ws.frame():
                step = reference.product_rows(weight, dtype, most)
                products = ws.empty(most * step, dtype=dtype)
                for first, last, block in reference.blocks(weight, dtype, ws, decode_block, step):
                    for (start, stop), rows in zip(ranges, padded, strict=True):
                        product = products[: len(rows) * (last - first)].view(len(rows), last - first)
                        _multiply(rows, block, product, out[start:stop, row + first : row + last], accumulate)
            row += weight.rows


def _int8_gemm(
    x: torch.Tensor,
    weights: Weight | Joined,
    out: torch.Tensor,
    ranges: Sequence[tuple[int, int]],
    ws: Workspace,
    accumulate: float,
) -> None:
    rounded = [reference.takes_int8(weight) for weight in weights.weights]
    if all(rounded):
        for start, stop in _joined_ranges(ranges):
            vector_matmul(x[start:stop], weights, out[start:stop], ws, activations="int8", accumulate=accumulate)
    elif not any(rounded):
        gemm(x, weights, out, ranges, torch.float32, ws, accumulate)
    else:
        row = 0
        for weight in weights.weights:
            gemm(x, weight, out[:, row : row + weight.rows], ranges, torch.int8, ws, accumulate)
            row += weight.rows


def matmul_t(g: torch.Tensor, weight: Weight, out: torch.Tensor, ws: Workspace) -> None:
    """``out = g @ W`` in float32: g (tokens, rows), out (tokens, cols)."""
    for start, stop, block in reference.blocks(weight, torch.float32, ws, decode_block):
        _add_product(g[:, start:stop], block, out, first=start == 0)


def _joined_ranges(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same rows with as few ranges as possible: one that begins where another ends is part of it."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _compiled_gemm(
    x: torch.Tensor, weights: Weight | Joined, out: torch.Tensor, ws: Workspace, accumulate: float
) -> None:
    tokens, threads = x.shape[0], cpu.threads()
    _check(x, (tokens, weights.cols))
    _check(out, (tokens, weights.rows))
    with ws.frame():
        scratch = ws.empty(cpu.module.gemm_scratch_nbytes(weights.cols, tokens, threads), dtype=torch.uint8)
        _gemm(weights.product, x, out, accumulate, scratch, threads)


def _check(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """The compiled kernels take addresses, so what they rely on is checked here. Gives the stride of rows."""
    strides = tensor.stride()
    if tensor.dtype is not dtype or tensor.shape != shape or strides[-1] != 1:
        raise ValueError(
            f"expected {dtype} {shape} without gaps in a row, found {tensor.dtype} {tuple(tensor.shape)} "
            f"with strides {strides}"
        )
    return strides[0]


@op
def _vector_matmul(
    product: Any,
    x: torch.Tensor,
    tokens: int,
    x_stride: int,
    out: torch.Tensor,
    out_stride: int,
    accumulate: float,
    int8: bool,
    scratch: torch.Tensor,
) -> None:
    product.matmul(
        x.data_ptr(),
        tokens,
        x_stride,
        out.data_ptr(),
        out_stride,
        accumulate,
        int8,
        scratch.data_ptr(),
        cpu.threads(),
    )


@op
def _gemm(
    product: Any, x: torch.Tensor, out: torch.Tensor, accumulate: float, scratch: torch.Tensor, threads: int
) -> None:
    cpu.module.gemm(
        product,
        x.data_ptr(),
        x.shape[0],
        x.stride(0),
        out.data_ptr(),
        out.stride(0),
        accumulate,
        scratch.data_ptr(),
        threads,
    )


@op
def _decode_block(weight: Weight, start: int, stop: int, out: torch.Tensor) -> None:
    bf16 = out.dtype == torch.bfloat16
    weight.handle.decode_block(start, stop, out.data_ptr(), out.stride(0), bf16, cpu.threads())


@op
def _decode_rows(weight: Weight, indices: torch.Tensor, out: torch.Tensor) -> None:
    weight.handle.decode_rows(indices.data_ptr(), len(indices), out.data_ptr(), out.stride(0), cpu.threads())


@op
def _pad(x: torch.Tensor, out: torch.Tensor) -> None:
    out[: len(x)].copy_(x)
    out[len(x) :].zero_()


@op
def _multiply(
    x: torch.Tensor, block: torch.Tensor, product: torch.Tensor, out: torch.Tensor, accumulate: float
) -> None:
    torch.mm(x, block.T, out=product)
    if accumulate:
        out.add_(product[: len(out)], alpha=accumulate)
    else:
        out.copy_(product[: len(out)])


@op
def _add_product(g: torch.Tensor, block: torch.Tensor, out: torch.Tensor, first: bool) -> None:
    torch.addmm(out, g, block, beta=0 if first else 1, out=out)
