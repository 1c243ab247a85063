"""Embeddings that stay on the disk: the rows of a step's tokens are read when they are looked up."""

from __future__ import annotations

from typing import Any

import torch

from tightfit.budget.ledger import Workspace
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.kernels.layout import TILE_ROWS
from tightfit.weights.formats.base import Format
from tightfit.weights.formats.tiles import Tiled
from tightfit.weights.placement.places import Group, Place
from tightfit.weights.placement.read import read_bytes


def by_rows(place: Place) -> bool:
    """Whether some rows of a matrix are a run of its bytes, and nothing else is needed to read them."""
    fmt = place.format
    return fmt is not None and type(fmt).begin is Format.begin


class RowsOnDisk:
    """The matrix of ``place`` in ``group``, of which only rows are wanted."""

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
        checkpoint, start = self._checkpoint, block * self._nbytes
        if checkpoint.compressed is not None:
            info = checkpoint.tensors[self._group.name]
            checkpoint.read_into(info, self._place.offset + start, data.numpy().data, again=True)
        else:
            read_bytes(checkpoint, self._place.param, 0, start, data)
