"""What a weight format is, and the matrix that it makes of a run of bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, TypeAlias

if TYPE_CHECKING:
    import torch

    from tightfit.budget.ledger import Workspace
    from tightfit.kernels.weight import Weight
    from tightfit.plan.schema import ActivationType

# Goes through all rows of a matrix: (first row, block), a block (n, cols) of any floating type.
Blocks: TypeAlias = "Callable[[], Iterator[tuple[int, torch.Tensor]]]"


@dataclass(frozen=True)
class Split:
    """Which rows of a flat list of tokens are multiplied how.

    Rows [0, ``vector``) go through the vector kernel: the bits of one row never depend on the others, so decoding and
    the verification of drafts agree at any number of rows. Each ``(start, stop)`` of ``gemm`` is one matrix product,
    whose bits depend on these rows only, so a prefill chunk's bits do not depend on what else is in the batch.
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
        if not self.gemm:
            return Split(len(rows))
        edges = [self.vector, *(stop for _, stop in self.gemm)]
        counts = [int((rows < edge).sum()) for edge in edges]
        return Split(counts[0], tuple((start, stop) for start, stop in pairwise(counts) if stop > start))


class Scheme(ABC):
    """In which format each matrix of a model is stored. A format is the scheme that stores them all in it."""

    name: ClassVar[str]  # set by the catalog

    @abstractmethod
    def of(self, param: str, layer: int | None, layers: int) -> Format:
        """The format of the parameter named ``param`` in layer ``layer`` of ``layers`` (None: outside of them)."""


class Format(Scheme):
    """How a matrix of weights is stored. Subclasses are frozen dataclasses; their fields are their settings.

    A matrix takes one contiguous run of bytes, which is used where it lies. Importing a format does not import torch.
    """

    def of(self, param: str, layer: int | None, layers: int) -> Format:
        return self

    @abstractmethod
    def nbytes(self, rows: int, cols: int) -> int:
        """The exact size of a matrix in bytes."""

    def begin(self, data: torch.Tensor, shape: tuple[int, int], blocks: Blocks) -> None:
        """Write the header of a matrix of ``shape`` to ``data``; called once, before any of its rows is encoded.

        A block of ``blocks`` is valid until the next one is asked for. Most formats have no header.
        """

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
        activations: ActivationType = "float32",
    ) -> Matrix:
        """The matrix that lies in ``data`` (uint8, contiguous, ``nbytes(rows, cols)`` long), without a copy.

        ``gemm_dtype`` is what gemm ranges are computed in: see :func:`tightfit.kernels.matmul.gemm`; torch.float32
        unless given.
        ``activations`` is what the vector kernel rounds its input to: "int8", or "float32" for not at all.
        """
        import torch

        if data.dtype != torch.uint8 or not data.is_contiguous() or data.numel() != self.nbytes(rows, cols):
            raise ValueError(
                f"a {rows} x {cols} matrix in {self.name} takes {self.nbytes(rows, cols)} contiguous bytes, "
                f"not {tuple(data.shape)} of {data.dtype}"
            )
        return self._matrix(data, rows, cols, gemm_dtype or torch.float32, activations)

    @abstractmethod
    def _matrix(
        self, data: torch.Tensor, rows: int, cols: int, gemm_dtype: torch.dtype, activations: ActivationType
    ) -> Matrix:
        """:meth:`matrix` for bytes of the right size."""


class Matrix(ABC):
    """``rows`` outputs by ``cols`` inputs in ``format``.

    All scratch comes from the workspace, and a dry run (:func:`tightfit.kernels.ops.dry`) takes the same. Made by
    :meth:`Format.matrix`.
    """

    def __init__(
        self, rows: int, cols: int, format: Format, gemm_dtype: torch.dtype, activations: ActivationType
    ) -> None:
        self.rows, self.cols, self.format = rows, cols, format
        self.gemm_dtype, self.activations = gemm_dtype, activations

    @abstractmethod
    def matmul(
        self, x: torch.Tensor, out: torch.Tensor, ws: Workspace, split: Split | None = None, accumulate: float = 0.0
    ) -> None:
        """``out = x @ W.T``, or ``out += accumulate * (x @ W.T)`` where that is not 0.

        ``x`` is (tokens, cols), ``out`` (tokens, rows), float32 with any row stride. ``split`` says which tokens go
        through the vector kernel and which through gemm; None is the vector kernel for all.
        """

    @abstractmethod
    def matmul_t(self, g: torch.Tensor, out: torch.Tensor, ws: Workspace) -> None:
        """``out = g @ W`` in float32: g (tokens, rows), out (tokens, cols)."""

    @abstractmethod
    def decode(self, indices: torch.Tensor, out: torch.Tensor, ws: Workspace) -> None:
        """``out[i] = W[indices[i]]``: indices int64 (n,), out (n, cols) float32 with any row stride.

        Raises IndexError for an index outside of the rows.
        """

    @abstractmethod
    def slice(self, start: int, stop: int) -> Matrix:
        """The rows [start, stop) as a matrix over the same bytes; ``start`` need not be a multiple of 16.

        Raises IndexError if there are no such rows.
        """


class PlainMatrix(Matrix):
    """A matrix that the kernels read as it is."""

    def __init__(self, weight: Weight, format: Format, gemm_dtype: torch.dtype, activations: ActivationType) -> None:
        from tightfit.kernels import matmul

        super().__init__(weight.rows, weight.cols, format, gemm_dtype, activations)
        self.weight = weight
        self._kernels = matmul

    def matmul(
        self, x: torch.Tensor, out: torch.Tensor, ws: Workspace, split: Split | None = None, accumulate: float = 0.0
    ) -> None:
        self._kernels.matmul(x, self.weight, out, ws, split, self.gemm_dtype, self.activations, accumulate)

    def matmul_t(self, g: torch.Tensor, out: torch.Tensor, ws: Workspace) -> None:
        self._kernels.matmul_t(g, self.weight, out, ws)

    def decode(self, indices: torch.Tensor, out: torch.Tensor, ws: Workspace) -> None:
        self._kernels.decode_rows(self.weight, indices, out, ws)

    def slice(self, start: int, stop: int) -> Matrix:
        return PlainMatrix(self.weight.slice(start, stop), self.format, self.gemm_dtype, self.activations)


class Joined:
    """Matrices of the same ``cols`` and settings, multiplied with the same input: a product has theirs side by side."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        from tightfit.kernels import matmul, weight

        self.matrices = tuple(matrices)
        self.rows = sum(matrix.rows for matrix in matrices)
        self._kernels = matmul
        plain = [matrix.weight for matrix in matrices if isinstance(matrix, PlainMatrix)]
        self._weights = weight.Joined(plain) if len(plain) == len(matrices) else None

    def matmul(
        self, x: torch.Tensor, out: torch.Tensor, ws: Workspace, split: Split | None = None, accumulate: float = 0.0
    ) -> None:
        """As :meth:`Matrix.matmul`, for ``out`` (tokens, the rows of all matrices)."""
        if self._weights is not None:
            first = self.matrices[0]
            self._kernels.matmul(x, self._weights, out, ws, split, first.gemm_dtype, first.activations, accumulate)
            return
        row = 0
        for matrix in self.matrices:
            matrix.matmul(x, out[:, row : row + matrix.rows], ws, split, accumulate)
            row += matrix.rows
