"""Low-bit formats in the canonical tile of 16 rows by one group of inputs (its layout is in ``kernels/layout.py``).

Each group of inputs of a row has a scale, and an offset if it is asymmetric, both in bfloat16 (or float16), chosen for
the smallest squared error (how is in ``kernels/encode_reference.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.errors import UsageError
from tightfit.kernels.layout import TILE_ROWS, tile_nbytes
from tightfit.weights.formats.base import Format, Matrix, PlainMatrix

if TYPE_CHECKING:
    import torch

    from tightfit.plan.schema import ActivationType

LARGEST_GROUP = 128


class Tiled(Format):
    """Tiles of ``kind``. ``group`` is a multiple of ``multiple`` up to 128, or 0: the inputs of a row share a scale."""

    kind: ClassVar[str]
    multiple: ClassVar[int] = 16
    header_nbytes: ClassVar[int] = 0
    group: int

    @property
    def asymmetric(self) -> bool:
        """Whether there is an offset beside each scale."""
        return False

    @property
    def half_scales(self) -> bool:
        """Whether scales and offsets are float16."""
        return False

    def __post_init__(self) -> None:
        if not 0 <= self.group <= LARGEST_GROUP or self.group % self.multiple:
            sizes = f"{self.multiple} to {LARGEST_GROUP} inputs and a multiple of {self.multiple}"
            raise UsageError(
                f"{self.name} cannot have groups of {self.group}", f"A group is {sizes}, or 0 for whole rows."
            )

    def tile_group(self, cols: int) -> int:
        """The inputs of a tile. With one scale for each row they are all, filled up to whole lines of codes."""
        multiple = max(self.multiple, 32)
        return self.group or -(-cols // multiple) * multiple

    def nbytes(self, rows: int, cols: int) -> int:
        group = self.tile_group(cols)
        tiles = -(-rows // TILE_ROWS) * -(-cols // group)
        return self.header_nbytes + tiles * tile_nbytes(self.kind, group, self.asymmetric)

    def encode(self, block: torch.Tensor, data: torch.Tensor, row: int) -> None:
        from tightfit.kernels.encode import encode, halve_scales

        rows, cols = block.shape
        start = self.nbytes(row, cols)
        stored = data[start : start + self.nbytes(rows, cols) - self.header_nbytes]
        encode(block, self.kind, self.tile_group(cols), self.asymmetric, self._exponent(data), stored)
        if self.half_scales:
            halve_scales(stored, self.kind, self.tile_group(cols), self.asymmetric)

    def _exponent(self, data: torch.Tensor) -> int:
        """The number of exponent bits, for floating-point codes."""
        return 0

    def _matrix(
        self, data: torch.Tensor, rows: int, cols: int, gemm_dtype: torch.dtype, activations: ActivationType
    ) -> Matrix:
        from tightfit.kernels.weight import Weight

        header, tiles = data[: self.header_nbytes], data[self.header_nbytes :]
        settings = header if self.header_nbytes else None
        group = self.tile_group(cols)
        weight = Weight(
            tiles,
            self.kind,
            group,
            rows,
            cols,
            asymmetric=self.asymmetric,
            settings=settings,
            half_scales=self.half_scales,
        )
        return PlainMatrix(weight, self, gemm_dtype, activations)


@dataclass(frozen=True)
class Integers(Tiled):
    """Whole numbers times a scale; unless ``symmetric``, with an offset that moves their middle to that of a group.

    ``scales`` is the type of scales and offsets: bf16, which has the range of all weights, or f16, in which GGUF files
    keep theirs. What is rounded here is rounded to scales in bfloat16 that float16 holds too; f16 rounds offsets less.
    """

    group: int = 32
    symmetric: bool = True
    scales: str = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scales not in ("bf16", "f16"):
            raise UsageError(f"{self.name} cannot have scales of type {self.scales!r}", "They are bf16 or f16.")

    @property
    def asymmetric(self) -> bool:
        return not self.symmetric

    @property
    def half_scales(self) -> bool:
        return self.scales == "f16"
