"""A matrix whose outlier columns are stored apart from the rest."""

from __future__ import annotations

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels.ops import op
from tightfit.weights.formats.base import Format, Matrix, Split


class OutlierMatrix(Matrix):
    """The sum of ``rest``, which is zero in ``columns``, and of ``outliers``, which has only those."""

    def __init__(self, rest: Matrix, outliers: Matrix, columns: torch.Tensor, format: Format) -> None:
        super().__init__(rest.rows, rest.cols, format, rest.gemm_dtype, rest.activations)
        self._rest, self._outliers, self._columns = rest, outliers, columns

    def matmul(
        self, x: torch.Tensor, out: torch.Tensor, ws: Workspace, split: Split | None = None, accumulate: float = 0.0
    ) -> None:
        split = split or Split.rows(len(x))
        with ws.frame():
            rest = x
            if self.activations == "int8" or self.gemm_dtype == torch.int8:
                # An outlier would take the resolution of the inputs that are rounded with it.
                rest = ws.empty(*x.shape)
                _without(x, self._columns, rest)
            self._rest.matmul(rest, out, ws, split, accumulate)
            inputs = ws.empty(len(x), self._outliers.cols)
            _gather(x, self._columns, inputs)
            self._outliers.matmul(inputs, out, ws, split, accumulate or 1.0)

    def matmul_t(self, g: torch.Tensor, out: torch.Tensor, ws: Workspace) -> None:
        self._rest.matmul_t(g, out, ws)
        with ws.frame():
            products = ws.empty(len(g), self._outliers.cols)
            self._outliers.matmul_t(g, products, ws)
            _scatter(products, self._columns, out)

    def decode(self, indices: torch.Tensor, out: torch.Tensor, ws: Workspace) -> None:
        self._rest.decode(indices, out, ws)
        with ws.frame():
            weights = ws.empty(len(indices), self._outliers.cols)
            self._outliers.decode(indices, weights, ws)
            _scatter(weights, self._columns, out)

    def slice(self, start: int, stop: int) -> Matrix:
        return OutlierMatrix(
            self._rest.slice(start, stop), self._outliers.slice(start, stop), self._columns, self.format
        )


@op
def _gather(x: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
    torch.index_select(x, 1, columns, out=out)


@op
def _without(x: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x).index_fill_(1, columns, 0)


@op
def _scatter(values: torch.Tensor, columns: torch.Tensor, out: torch.Tensor) -> None:
    out.index_copy_(1, columns, values)
