"""Pruned weights: the positions of those that are not zero, and their values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kernels.layout import pruned_row_nbytes
from tightfit.weights.formats.base import Format, Matrix, PlainMatrix

if TYPE_CHECKING:
    import torch

    from tightfit.plan.schema import ActivationType


@technique(
    seam="weights",
    name="pruned",
    paper="https://arxiv.org/abs/2406.11674",
    exact=False,
    summary="a share of each row's weights in bfloat16, a bit for each that tells whether it is zero",
)
@dataclass(frozen=True)
class Pruned(Format):
    """Endor's format for matrices with zeros in any places: a bitmap of the weights that are not zero, and those,
    packed, in bfloat16. With ``keep=0.5`` that is (0.5 * 16 + 1) / 16 of dense bfloat16.

    ``keep`` is the share of each row's weights that there is room for, rounded up. A bfloat16 checkpoint that was
    pruned to it row by row, as Wanda (https://arxiv.org/abs/2306.11695) does, is held bit by bit, but for the sign of
    zeros. Of rows with more weights the largest magnitudes stay, of equal ones the first. So a checkpoint whose rows
    keep unequal shares, as SparseGPT (https://arxiv.org/abs/2301.00774) leaves them, needs the share of its fullest row
    to be held whole; and one that was not pruned gets plain magnitude pruning, the baseline of those two methods.

    It departs from Endor in that every row has room for the same number of values, so that the size does not depend on
    the weights and rows are found without an index; and in that nothing is expanded to a dense matrix: products read
    the packed values, in memory as in a buffer that was filled from the disk.
    """

    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise UsageError(
                f"pruned cannot keep a share of {self.keep:g} of the weights",
                "It is between 0 and 1, for example keep=0.5; all of them are kept by bf16.",
            )

    def kept(self, cols: int) -> int:
        """How many of a row's ``cols`` weights there is room for."""
        return math.ceil(Fraction(str(self.keep)) * cols)

    def nbytes(self, rows: int, cols: int) -> int:
        return rows * pruned_row_nbytes(cols, self.kept(cols))

    def encode(self, block: torch.Tensor, data: torch.Tensor, row: int) -> None:
        from tightfit.kernels.pruned import prune

        rows, cols = block.shape
        prune(block, self.kept(cols), data[self.nbytes(row, cols) : self.nbytes(row + rows, cols)])

    def _matrix(
        self, data: torch.Tensor, rows: int, cols: int, gemm_dtype: torch.dtype, activations: ActivationType
    ) -> Matrix:
        from tightfit.kernels.weight import Weight

        return PlainMatrix(Weight(data, "pruned", 0, rows, cols, kept=self.kept(cols)), self, gemm_dtype, activations)
