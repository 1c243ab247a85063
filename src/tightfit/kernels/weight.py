"""A stored matrix as the kernels see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tightfit.kernels import cpu
from tightfit.kernels.layout import PLANES, TILE_ROWS, pruned_row_nbytes, tile_nbytes

DENSE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(eq=False)
class Weight:
    """``rows`` by ``cols`` numbers stored in ``data`` (uint8, one contiguous run).

    ``kind`` is a key of DENSE (row-major), "pruned" (rows with room for ``kept`` values), both with ``group`` 0, or the
    kind of canonical tiles of 16 rows by ``group`` inputs, with an offset beside each scale if ``asymmetric``, both in
    float16 if ``half_scales`` (see ``kernels/layout.py``). ``row_offset`` is the first row's place in the first tile.
    ``settings`` is the header of an fp8 matrix (uint8; byte 0 is the number of exponent bits), None for the others.
    ``handle`` is the compiled kernels' view of the same bytes, and ``product`` that of the matrix as one to multiply
    with; None if there are none.
    """

    data: torch.Tensor
    kind: str
    group: int
    rows: int
    cols: int
    row_offset: int = 0
    asymmetric: bool = False
    settings: torch.Tensor | None = None
    kept: int = 0
    half_scales: bool = False
    handle: Any = field(init=False)
    product: Any = field(init=False)

    def __post_init__(self) -> None:
        settings = 0 if self.settings is None else self.settings.data_ptr()
        self.handle = cpu.handle(
            self.kind,
            self.group,
            self.asymmetric,
            self.data.data_ptr(),
            self.rows,
            self.cols,
            self.row_offset,
            settings,
            self.kept,
            self.half_scales,
        )
        self.product = cpu.joined([self.handle])

    @property
    def weights(self) -> tuple[Weight, ...]:
        return (self,)

    @property
    def exponent(self) -> int:
        """The number of exponent bits of an fp8 matrix; what nothing was written to yet is read as 4."""
        return 0 if self.settings is None else int(self.settings[0]) or 4

    def slice(self, start: int, stop: int) -> Weight:
        """The rows [start, stop) over the same bytes. Raises IndexError if there are no such rows."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start} to {stop} of a matrix of {self.rows} rows")
        first = self.row_offset + start
        offset = first % TILE_ROWS if self.kind in PLANES else 0
        data = self.data[self._nbytes(first - offset) : self._nbytes(first + stop - start)]
        return replace(self, data=data, rows=stop - start, row_offset=offset)

    def _nbytes(self, rows: int) -> int:
        """Bytes of the first ``rows`` rows, of tiles whole ones."""
        if self.kind == "pruned":
            return rows * pruned_row_nbytes(self.cols, self.kept)
        if self.kind in DENSE:
            return rows * self.cols * DENSE[self.kind].itemsize
        groups = -(-self.cols // self.group)
        return -(-rows // TILE_ROWS) * groups * tile_nbytes(self.kind, self.group, self.asymmetric)

    def dense(self) -> torch.Tensor | None:
        """The matrix as a (rows, cols) tensor over ``data`` if it is stored row-major, else None."""
        dtype = DENSE.get(self.kind)
        return None if dtype is None else self.data.view(dtype).view(self.rows, self.cols)


class Joined:
    """Matrices of the same number of columns that are multiplied with one input, such as q, k and v.

    ``rows`` is the sum of theirs: a product has them one after the other. ``product`` is as in :class:`Weight`.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = tuple(weights)
        self.rows = sum(weight.rows for weight in weights)
        self.cols = self.weights[0].cols
        if any(weight.cols != self.cols for weight in weights):
            raise ValueError(f"matrices of {[weight.cols for weight in weights]} columns take no common input")
        self.product = cpu.joined([weight.handle for weight in weights])
