"""8-bit floating point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.weights.formats.base import Blocks
from tightfit.weights.formats.tiles import Tiled

if TYPE_CHECKING:
    import torch

EXPONENTS = (2, 3, 4, 5)
UNWRITTEN = 4  # what a header that nothing was written to is read as


@technique(
    seam="weights",
    name="fp8",
    paper="https://arxiv.org/abs/2208.09225",
    exact=False,
    summary="8-bit floating point, e5m2 to e2m5 as suits each matrix, a scale for each row",
)
@dataclass(frozen=True)
class FP8(Tiled):
    """A sign, ``exponent`` bits of exponent (2 to 5) and the rest mantissa, times a scale for each row or group.

    With ``exponent=0`` each matrix has the number of exponent bits with the smallest squared error, after "FP8
    Quantization: The Power of the Exponent", whose finding is that it grows with a tensor's outliers (2 suit a normal
    distribution). It departs from that in the scale, which each row or group has, so that the bias need not be learnt,
    and in counting the error with the scales that are stored. "FP8 versus INT8" (https://arxiv.org/abs/2303.17951)
    compares the two: with a group's own scale, ``int8`` is as good but for heavy outliers.

    e4m3 and e5m2 are torch.float8_e4m3fn and torch.float8_e5m2, and never NaN or infinite; the others have no such
    codes. The header's first byte is the number of exponent bits.
    """

    kind = "fp8"
    header_nbytes = 64
    exponent: int = 0
    group: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exponent not in (0, *EXPONENTS):
            raise UsageError(
                f"fp8 cannot have {self.exponent} bits of exponent",
                "They are 2, 3, 4 or 5, or 0 for what suits each matrix.",
            )

    def begin(self, data: torch.Tensor, shape: tuple[int, int], blocks: Blocks) -> None:
        data[: self.header_nbytes].zero_()
        data[0] = self.exponent or self._best_exponent(shape[1], blocks)

    def _exponent(self, data: torch.Tensor) -> int:
        return int(data[0]) or UNWRITTEN

    def _best_exponent(self, cols: int, blocks: Blocks) -> int:
        import torch

        from tightfit.kernels.encode import encode

        errors = dict.fromkeys(EXPONENTS, 0.0)
        for _, block in blocks():
            scratch = torch.empty(self.nbytes(len(block), cols) - self.header_nbytes, dtype=torch.uint8)
            for exponent in EXPONENTS:
                errors[exponent] += encode(block, self.kind, self.tile_group(cols), False, exponent, scratch)
        return min(errors, key=lambda exponent: errors[exponent])
