"""What a weight format is, and the matrix that it makes of a run of bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from tightfit.budget.ledger import Workspace

TILE_ROWS = 16


@dataclass(frozen=True)
class Split:
    """Which rows of a flat list of tokens are multiplied how.

    Rows [0, ``vector``) go through the vector kernel: the bits of one row never depend on the others, so decoding and
    the verification of drafts agree at any number of rows. Each ``(start, stop)`` of ``gemm`` is one matrix product,
    padded to a bucket that depends on ``stop - start`` only, so a prefill chunk's bits do not depend on what else is in
    the batch.
    """

    vector: int
    gemm: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def rows(count: int) -> Split:
        """Every one of ``count`` rows by the vector kernel."""
        return Split(count)

    @cached_property
    def parts(self) -> list[tuple[int, int]]:
        """Ranges of rows that are computed together: each vector row alone, each gemm range."""
        return [(row, row + 1) for row in range(self.vector)] + list(self.gemm)

    def of_rows(self, rows: torch.Tensor) -> Split:
        """The split of a selection of the rows: ``rows`` (n,) int64, ascending."""
        edges = [self.vector, *(stop for _, stop in self.gemm)]
        counts = [int((rows < edge).sum()) for edge in edges]
        return Split(counts[0], tuple((start, stop) for start, stop in pairwise(counts) if stop > start))


class Format(ABC):
    """How a matrix of weights is stored. Subclasses are frozen dataclasses; their fields are their settings.

    A matrix takes one contiguous run of bytes, which is used where it lies. ``kind`` and ``group`` tell the kernels the
    layout; ``group`` is 0 where there are no groups. Importing a format does not import torch.
    """

    name: ClassVar[str]  # set by the catalog
    kind: ClassVar[str]
    group: int

    @abstractmethod
    def nbytes(self, rows: int, cols: int) -> int:
        """The exact size of a matrix in bytes."""

    @abstractmethod
    def encode(self, block: torch.Tensor, data: torch.Tensor, row: int) -> None:
        """Write ``block``, the rows [row, row + n) of a matrix, to their place in ``data``.

        ``block`` is (n, cols) of any floating type; ``row`` is a multiple of 16, and n is too unless the block is the
        matrix's end. ``data`` is the whole matrix, uint8, ``nbytes(rows, cols)`` long. Raises CheckpointError for
        values that the format cannot hold.
        """

    def matrix(
        self,
        data: torch.Tensor,
        rows: int,
        cols: int,
        gemm_dtype: torch.dtype | None = None,
        activations: str = "float32",
    ) -> Matrix:
        """The matrix that lies in ``data`` (uint8, contiguous, ``nbytes(rows, cols)`` long), without a copy.

        ``gemm_dtype`` is what gemm ranges are computed in: torch.bfloat16 or torch.float32 (the default).
        """
        import torch

        if data.dtype != torch.uint8 or not data.is_contiguous() or data.numel() != self.nbytes(rows, cols):
            raise ValueError(
                f"a {rows} x {cols} matrix in {self.name} takes {self.nbytes(rows, cols)} contiguous bytes, "
                f"not {tuple(data.shape)} of {data.dtype}"
            )
        return Matrix(data, rows, cols, self, gemm_dtype or torch.float32)


class Matrix:
    """``rows`` outputs by ``cols`` inputs in ``format``, over the bytes of ``data`` (uint8).

    All scratch comes from the workspace, and a dry run (:func:`tightfit.kernels.ops.dry`) takes the same. Made by
    :meth:`Format.matrix`; ``row_offset`` is the first row's place in its tile.
    """

    def __init__(
        self, data: torch.Tensor, rows: int, cols: int, format: Format, gemm_dtype: torch.dtype, row_offset: int = 0
    ) -> None:
        from tightfit.kernels import matmul
        from tightfit.kernels.weight import Weight

        self.data, self.rows, self.cols, self.format, self.gemm_dtype = data, rows, cols, format, gemm_dtype
        self._weight = Weight(data, format.kind, format.group, rows, cols, row_offset)
        self._kernels = matmul

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    def matmul(
        self, x: torch.Tensor, out: torch.Tensor, ws: Workspace, split: Split | None = None, accumulate: float = 0.0
    ) -> None:
        """``out = x @ W.T``: x (tokens, cols), out (tokens, rows), float32 with any row stride.

        ``split`` says which tokens go through the vector kernel and which through gemm; None is the vector kernel for
        all.
        """
        if accumulate:
            from tightfit.kernels import ops

            with ws.frame():
                product = ws.empty(*out.shape)
                self.matmul(x, product, ws, split)
                ops.add_(out, product, accumulate)
            return
        if split is None or split.vector == x.shape[0]:
            self._kernels.vector_matmul(x, self._weight, out, ws)
            return
        if split.vector:
            self._kernels.vector_matmul(x[: split.vector], self._weight, out[: split.vector], ws)
        if split.gemm:
            self._kernels.gemm(x, self._weight, out, split.gemm, self.gemm_dtype, ws)

    def matmul_t(self, g: torch.Tensor, out: torch.Tensor, ws: Workspace) -> None:
        """``out = g @ W`` in float32: g (tokens, rows), out (tokens, cols)."""
        self._kernels.matmul_t(g, self._weight, out, ws)

    def decode(self, indices: torch.Tensor, out: torch.Tensor, ws: Workspace) -> None:
        """``out[i] = W[indices[i]]``: indices int64 (n,), out (n, cols) float32 with any row stride.

        Raises IndexError for an index outside of the rows.
        """
        self._kernels.decode_rows(self._weight, indices, out, ws)

    def slice(self, start: int, stop: int) -> Matrix:
        """The rows [start, stop) as a matrix over the same bytes; ``start`` need not be a multiple of 16."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start} to {stop} of a matrix of {self.rows} rows")
        first = self._weight.row_offset + start
        offset = first % TILE_ROWS if self.format.group else 0
        begin = self.format.nbytes(first - offset, self.cols)
        data = self.data[begin : begin + self.format.nbytes(offset + stop - start, self.cols)]
        return Matrix(data, stop - start, self.cols, self.format, self.gemm_dtype, offset)


class Joined:
    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.matrices = tuple(matrices)
        self.rows = sum(matrix.rows for matrix in matrices)

    def matmul(
        self, x: torch.Tensor, out: torch.Tensor, ws: Workspace, split: Split | None = None, accumulate: float = 0.0
    ) -> None:
        row = 0
        for matrix in self.matrices:
            matrix.matmul(x, out[:, row : row + matrix.rows], ws, split, accumulate)
            row += matrix.rows
