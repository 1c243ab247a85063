"""Matrices outside of the layers that are not all in memory: embeddings, of which the rows of a step's tokens are read
when they are looked up, and the head, whose rows stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch

from tightfit.budget.ledger import Workspace
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.kernels.layout import TILE_ROWS
from tightfit.weights.formats.base import Format, Matrix
from tightfit.weights.formats.tiles import Tiled
from tightfit.weights.placement.places import Group, Place, read_place


def by_rows(place: Place) -> bool:
    """Whether some rows of a matrix are a run of its bytes, and nothing else is needed to read them."""
    fmt = place.format
    return fmt is not None and type(fmt).begin is Format.begin


def rows_of(place: Place, start: int, stop: int) -> Place:
    """The rows [start, stop) of a matrix for which :func:`by_rows` holds; ``start`` is a multiple of 16."""
    fmt, param = place.format, place.param
    assert fmt is not None
    cols = param.shape[1]
    nbytes = fmt.nbytes(stop - start, cols)
    source = replace(param.source, start=param.source.start + start)
    part = replace(param, shape=(stop - start, cols), source=source)
    return Place(part, fmt, place.offset + fmt.nbytes(start, cols), nbytes, nbytes)


class RowsOnDisk:
    """The matrix of ``place`` in ``group``, of which rows are looked up."""

    def __init__(self, checkpoint: Checkpoint, group: Group, place: Place, settings: tuple[Any, ...]) -> None:
        assert place.format is not None
        self._checkpoint, self._group, self._place, self._settings = checkpoint, group, place, settings
        self._format = place.format
        self._at_once = TILE_ROWS if isinstance(place.format, Tiled) else 1  # rows whose bytes are one run
        self._nbytes = self._format.nbytes(self._at_once, place.param.shape[1])

    def decode(self, indices: torch.Tensor, out: torch.Tensor, ws: Workspace) -> None:
        """As :meth:`tightfit.weights.formats.base.Matrix.decode`."""
        rows, cols = self._place.param.shape
        with ws.frame():
            data = ws.empty(self._nbytes, dtype=torch.uint8)
            matrix = self._format.matrix(data, self._at_once, cols, *self._settings)
            held = -1
            for at, row in enumerate(indices.tolist()):
                if not 0 <= row < rows:
                    raise IndexError(f"row {row} of a matrix of {rows} rows")
                block, place = divmod(row, self._at_once)
                if block != held:
                    self._read(block, data)
                    held = block
                matrix.decode(torch.tensor([place]), out[at : at + 1], ws)

    def _read(self, block: int, data: torch.Tensor) -> None:
        read_place(self._checkpoint, self._group.name, self._place, 0, block * self._nbytes, data, again=True)


Use = Callable[[int], AbstractContextManager[Mapping[str, Any]]]


class StreamedRows(RowsOnDisk):
    """The same, to be multiplied with too: its first rows are in memory, ``resident``, and the others lie one after the
    other in ``units`` of what is streamed. ``use`` gives the parameters of a unit."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        group: Group,
        place: Place,
        settings: tuple[Any, ...],
        resident: Matrix | None,
        units: Sequence[int],
        use: Use,
    ) -> None:
        super().__init__(checkpoint, group, place, settings)
        self._resident, self._units, self._use = resident, units, use

    def matmul(self, x: torch.Tensor, out: torch.Tensor, ws: Workspace) -> None:
        """As :meth:`tightfit.weights.formats.base.Matrix.matmul` by the vector kernel, whose bits do not depend on
        which rows of the matrix are multiplied together. Without tokens nothing is read."""
        if not len(x):
            return
        kept = 0 if self._resident is None else self._resident.rows
        row = kept
        for number, unit in enumerate(self._units):
            if self._resident is not None:  # a share of it at a time, while the next unit is read
                start, stop = (kept // TILE_ROWS * at // len(self._units) * TILE_ROWS for at in (number, number + 1))
                self._resident.slice(start, stop).matmul(x, out[:, start:stop], ws)
            with self._use(unit) as parameters:
                part: Matrix = parameters[self._place.param.name]
                part.matmul(x, out[:, row : row + part.rows], ws)
                row += part.rows
