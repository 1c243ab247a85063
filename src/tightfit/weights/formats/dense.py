"""Formats that keep floating-point numbers as a checkpoint does: float32, float16 and bfloat16, row after row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.errors import CheckpointError
from tightfit.weights.formats.base import Format, Matrix, PlainMatrix

if TYPE_CHECKING:
    import torch

    from tightfit.plan.schema import ActivationType

F16_MAX = 65504.0


class Dense(Format):
    """Numbers of ``itemsize`` bytes, row-major, without padding."""

    kind: ClassVar[str]
    itemsize: ClassVar[int]
    group: ClassVar[int] = 0  # there are no groups

    def nbytes(self, rows: int, cols: int) -> int:
        return rows * cols * self.itemsize

    def encode(self, block: torch.Tensor, data: torch.Tensor, row: int) -> None:
        from tightfit.kernels.weight import DENSE

        rows, cols = block.shape
        start = self.nbytes(row, cols)
        stored = data[start : start + self.nbytes(rows, cols)]
        stored.view(DENSE[self.kind]).view(rows, cols).copy_(block)

    def _matrix(
        self, data: torch.Tensor, rows: int, cols: int, gemm_dtype: torch.dtype, activations: ActivationType
    ) -> Matrix:
        from tightfit.kernels.weight import Weight

        return PlainMatrix(Weight(data, self.kind, self.group, rows, cols), self, gemm_dtype, activations)


@technique(seam="weights", name="f32", paper="", exact=True, summary="float32, 4 bytes per weight")
@dataclass(frozen=True)
class F32(Dense):
    """IEEE 754 single precision."""

    kind = "f32"
    itemsize = 4


@technique(seam="weights", name="f16", paper="", exact=True, summary="float16, 2 bytes per weight")
@dataclass(frozen=True)
class F16(Dense):
    """IEEE 754 half precision; exact for float16 checkpoints. Raises CheckpointError above 65504 when encoding."""

    kind = "f16"
    itemsize = 2

    def encode(self, block: torch.Tensor, data: torch.Tensor, row: int) -> None:
        if block.numel():
            low, high = (float(extreme) for extreme in block.aminmax())
            if low < -F16_MAX or high > F16_MAX:
                raise CheckpointError(
                    f"a weight of {max(-low, high):g} does not fit into float16 (at most {F16_MAX:g})",
                    "Use --weights bf16.",
                )
        super().encode(block, data, row)


@technique(seam="weights", name="bf16", paper="", exact=True, summary="bfloat16, 2 bytes per weight")
@dataclass(frozen=True)
class BF16(Dense):
    """The upper half of a float32; exact for bfloat16 checkpoints."""

    kind = "bf16"
    itemsize = 2
