"""A stored matrix in an autograd graph: the base layer under LoRA and other adapters."""

from __future__ import annotations

from typing import Any

import torch

from tightfit.budget.ledger import Workspace
from tightfit.weights.formats.base import Matrix, Split


def linear(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """``x @ W.T`` with a gradient for ``x`` and none for the frozen matrix, as in QLoRA (arXiv 2305.14314).

    ``x`` is (..., cols) of any floating type, the result (..., rows) of the same. The product is a gemm in the matrix's
    ``gemm_dtype``, its gradient one in float32; nothing of the decoded matrix is kept for the backward pass.
    """
    result: torch.Tensor = _Linear.apply(x, matrix)  # type: ignore[no-untyped-call]
    return result


class _Heap(Workspace):
    """Scratch from torch's allocator, where autograd keeps its tensors too."""

    def __init__(self) -> None:
        self.top = 0

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or torch.float32)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        ctx.matrix = matrix
        tokens = x.reshape(-1, matrix.cols).float().contiguous()
        out = torch.empty(len(tokens), matrix.rows)
        if len(tokens):
            matrix.matmul(tokens, out, _Heap(), Split(0, ((0, len(tokens)),)))
        return out.to(x.dtype).view(*x.shape[:-1], matrix.rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        matrix: Matrix = ctx.matrix
        g = gradient.reshape(-1, matrix.rows).float().contiguous()
        out = torch.empty(len(g), matrix.cols)
        matrix.matmul_t(g, out, _Heap())
        return out.to(gradient.dtype).view(*gradient.shape[:-1], matrix.cols), None
