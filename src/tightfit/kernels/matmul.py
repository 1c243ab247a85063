"""Products with stored matrices: a vector kernel for decoding, gemm for prefill, and the decoding of rows.

The vector kernel computes each token's row in a fixed order of its own, so its bits depend neither on the number of
tokens nor on threads. Gemm decodes the matrix block by block into scratch and multiplies there. The compiled kernels
are used where they are found, else the references.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import cpu
from tightfit.kernels import matmul_reference as reference
from tightfit.kernels.ops import op
from tightfit.kernels.weight import Weight

SMALLEST_BUCKET = 16


def bucket(n: int) -> int:
    """The number of rows that a gemm over ``n`` tokens is padded to: a power of two, at least 16."""
    return max(1 << (n - 1).bit_length(), SMALLEST_BUCKET)


def vector_matmul(x: torch.Tensor, weight: Weight, out: torch.Tensor, ws: Workspace) -> None:
    """``out = x @ W.T``: x (tokens, cols), out (tokens, rows), float32 with any row stride."""
    tokens = x.shape[0]
    _check(x, (tokens, weight.cols))
    _check(out, (tokens, weight.rows))
    if cpu.available():
        _vector_matmul(x, weight, out)
    else:
        reference.vector_matmul(x, weight, out, ws)


def decode_block(weight: Weight, start: int, stop: int, out: torch.Tensor, ws: Workspace) -> None:
    """``out = W[start:stop]``, (stop - start, cols), float32 or bfloat16 (rounded to nearest even), any row stride."""
    _check(out, (stop - start, weight.cols), out.dtype)
    if cpu.available() and weight.group:
        _decode_block(weight, start, stop, out)
    else:
        reference.decode_block(weight, start, stop, out, ws)


def decode_rows(weight: Weight, indices: torch.Tensor, out: torch.Tensor, ws: Workspace) -> None:
    """``out[i] = W[indices[i]]``: indices int64 (n,), out (n, cols) float32 with any row stride.

    Raises IndexError for an index outside of the rows.
    """
    _check(indices, (len(indices),), torch.int64)
    _check(out, (len(indices), weight.cols))
    if cpu.available() and weight.group:
        _decode_rows(weight, indices, out)
    else:
        reference.decode_rows(weight, indices, out, ws)


def gemm(
    x: torch.Tensor,
    weight: Weight,
    out: torch.Tensor,
    ranges: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    ws: Workspace,
) -> None:
    """``out[a:b] = x[a:b] @ W.T`` for each (a, b) of ``ranges``, computed in ``dtype`` (bfloat16 or float32).

    Each range is padded to its bucket. The matrix is decoded once for all of them, a block of rows at a time; one that
    is stored in ``dtype`` is used where it lies.
    """
    with ws.frame():
        padded = []
        for start, stop in ranges:
            padded.append(ws.empty(bucket(stop - start), weight.cols, dtype=dtype))
            _pad(x[start:stop], padded[-1])
        most = max(map(len, padded))
        step = reference.product_rows(weight, dtype, most)
        products = ws.empty(most * step, dtype=dtype)
        for first, last, block in reference.blocks(weight, dtype, ws, decode_block, step):
            for (start, stop), rows in zip(ranges, padded, strict=True):
                product = products[: len(rows) * (last - first)].view(len(rows), last - first)
                _multiply(rows, block, product, out[start:stop, first:last])


def matmul_t(g: torch.Tensor, weight: Weight, out: torch.Tensor, ws: Workspace) -> None:
    """``out = g @ W`` in float32: g (tokens, rows), out (tokens, cols)."""
    for start, stop, block in reference.blocks(weight, torch.float32, ws, decode_block):
        _add_product(g[:, start:stop], block, out, first=start == 0)


def _check(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    """The compiled kernels take addresses, so what they rely on is checked here."""
    if tensor.dtype is not dtype or tensor.shape != shape or tensor.stride(-1) != 1:
        raise ValueError(
            f"expected {dtype} {shape} without gaps in a row, found {tensor.dtype} {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}"
        )


@op
def _vector_matmul(x: torch.Tensor, weight: Weight, out: torch.Tensor) -> None:
    weight.handle.matmul(x.data_ptr(), x.shape[0], x.stride(0), out.data_ptr(), out.stride(0), cpu.threads())


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
def _multiply(x: torch.Tensor, block: torch.Tensor, product: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(x, block.T, out=product)
    out.copy_(product[: len(out)])


@op
def _add_product(g: torch.Tensor, block: torch.Tensor, out: torch.Tensor, first: bool) -> None:
    torch.addmm(out, g, block, beta=0 if first else 1, out=out)
