"""A stored matrix as the kernels see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tightfit.kernels import cpu

DENSE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
TILE_ROWS = 16


@dataclass(eq=False)
class Weight:
    """``rows`` by ``cols`` numbers stored in ``data`` (uint8, one contiguous run).

    ``kind`` is a key of DENSE (row-major, ``group`` 0), or the kind of canonical tiles of 16 rows by ``group`` inputs
    (see ``weights/formats/tiles.py``), with an offset beside each scale if ``asymmetric``. ``row_offset`` is the first
    row's place in the first tile. ``settings`` is the header of an fp8 matrix (uint8; byte 0 is the number of exponent
    bits), None for the others. ``handle`` is the compiled kernels' view of the same bytes; None if there are none.
    """

    data: torch.Tensor
    kind: str
    group: int
    rows: int
    cols: int
    row_offset: int = 0
    asymmetric: bool = False
    settings: torch.Tensor | None = None
    handle: Any = field(init=False)

    def __post_init__(self) -> None:
        settings = 0 if self.settings is None else self.settings.data_ptr()
        self.handle = cpu.handle(
            self.kind, self.group, self.asymmetric, self.data.data_ptr(), self.rows, self.cols, self.row_offset, settings
        )

    def dense(self) -> torch.Tensor | None:
        """The matrix as a (rows, cols) tensor over ``data`` if it is stored row-major, else None."""
        dtype = DENSE.get(self.kind)
        return None if dtype is None else self.data.view(dtype).view(self.rows, self.cols)
