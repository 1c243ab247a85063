"""8-bit integers with outlier columns in 16 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kernels.layout import TILE_ROWS
from tightfit.weights.formats.base import Blocks, Format, Matrix
from tightfit.weights.formats.dense import BF16
from tightfit.weights.formats.int8 import Int8

if TYPE_CHECKING:
    import torch

    from tightfit.plan.schema import ActivationType

REST, OUTLIERS = Int8(group=0), BF16()
COLUMN_NBYTES, ALIGNMENT = 8, 64


@technique(
    seam="weights",
    name="llm_int8",
    paper="https://arxiv.org/abs/2208.07339",
    exact=False,
    summary="8-bit integers with a scale for each row, and a share of columns in bfloat16",
)
@dataclass(frozen=True)
class LlmInt8(Format):
    """LLM.int8()'s decomposition: the inputs with outliers are multiplied in 16 bits, all others in 8, and both added.

    ``outliers`` is the share of the columns that are kept in bfloat16. LLM.int8() finds them while it runs, as the
    features of which an activation exceeds 6. Here they are fixed when the matrix is encoded, because storing all
    columns twice would cost more than it saves, and chosen from the weights, as no activations are known: those with
    the largest weights relative to the mean magnitude of their row. The header lists them, so a method that has seen
    activations writes others and needs no other format.

    The bytes are the columns (int64, ascending, filled up to a multiple of 64 bytes), the matrix in ``int8(group=0)``
    with zeros in those columns, and those columns in bfloat16, row after row, the rows filled up to 16.
    """

    outliers: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.outliers < 1:
            raise UsageError(
                f"llm_int8 cannot keep a share of {self.outliers:g} of the columns as outliers",
                "It is between 0 and 1, for example outliers=0.01; without outliers it is int8(group=0).",
            )

    def columns(self, cols: int) -> int:
        """How many of ``cols`` columns are kept as outliers."""
        return math.ceil(cols * self.outliers)

    def nbytes(self, rows: int, cols: int) -> int:
        return self._header_nbytes(cols) + -(-rows // TILE_ROWS) * sum(self._tile_row_nbytes(cols))

    def begin(self, data: torch.Tensor, shape: tuple[int, int], blocks: Blocks) -> None:
        import torch

        cols = shape[1]
        largest = torch.zeros(cols)
        for _, block in blocks():
            magnitudes = block.float().abs()
            mean = (magnitudes / cols).sum(dim=1, keepdim=True)
            torch.maximum(largest, magnitudes.div_(mean.masked_fill_(mean == 0, 1)).amax(0), out=largest)
        order = largest.argsort(descending=True, stable=True)
        data[: self._header_nbytes(cols)].zero_()
        self._stored_columns(data, cols).copy_(order[: self.columns(cols)].sort().values)

    def encode(self, block: torch.Tensor, data: torch.Tensor, row: int) -> None:
        import torch

        from tightfit.kernels.encode import not_finite

        cols = block.shape[1]
        columns = self._stored_columns(data, cols)
        outliers = block[:, columns]
        if not outliers.isfinite().all():
            raise not_finite()
        rest = block.to(torch.float32, copy=True).index_fill_(1, columns, 0)
        stored_rest, stored_outliers = self._parts(data, cols)
        REST.encode(rest, stored_rest, row)
        OUTLIERS.encode(outliers, stored_outliers, row)

    def _matrix(
        self, data: torch.Tensor, rows: int, cols: int, gemm_dtype: torch.dtype, activations: ActivationType
    ) -> Matrix:
        from tightfit.weights.formats.outliers import OutlierMatrix

        stored_rest, stored_outliers = self._parts(data, cols)
        rest = REST.matrix(stored_rest, rows, cols, gemm_dtype, activations)
        count = self.columns(cols)
        outliers = OUTLIERS.matrix(stored_outliers[: OUTLIERS.nbytes(rows, count)], rows, count, gemm_dtype)
        return OutlierMatrix(rest, outliers, self._stored_columns(data, cols), self)

    def _header_nbytes(self, cols: int) -> int:
        return -(-self.columns(cols) * COLUMN_NBYTES // ALIGNMENT) * ALIGNMENT

    def _tile_row_nbytes(self, cols: int) -> tuple[int, int]:
        """Bytes that 16 rows take of the matrix and of the outlier columns."""
        return REST.nbytes(TILE_ROWS, cols), OUTLIERS.nbytes(TILE_ROWS, self.columns(cols))

    def _stored_columns(self, data: torch.Tensor, cols: int) -> torch.Tensor:
        import torch

        return data[: self.columns(cols) * COLUMN_NBYTES].view(torch.int64)

    def _parts(self, data: torch.Tensor, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The bytes of the matrix and of the outlier columns."""
        body = data[self._header_nbytes(cols) :]
        rest, outliers = self._tile_row_nbytes(cols)
        end = len(body) // (rest + outliers) * rest
        return body[:end], body[end:]
