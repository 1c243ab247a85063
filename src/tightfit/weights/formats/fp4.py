"""4-bit floating point."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.catalog import technique
from tightfit.weights.formats.tiles import Tiled


@technique(
    seam="weights",
    name="fp4",
    paper="https://arxiv.org/abs/2310.10537",
    exact=False,
    summary="4-bit floating point e2m1, a scale for each row and block of inputs",
)
@dataclass(frozen=True)
class FP4(Tiled):
    """The numbers 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, with a scale for each block: the OCP formats' e2m1.

    With the default block of 32 it holds what MXFP4 holds, bit for bit; it departs from that in the scale, a bfloat16
    of the smallest squared error instead of a power of two. Other 4-bit floats are not offered: BitMoD
    (https://arxiv.org/abs/2411.11745) picks one of several sets of levels for each group, and Transformer-Lite's M0E4
    (https://arxiv.org/abs/2403.20041) has exponents only, because a GPU turns them into float16 without a table; the
    kernels here look any 16 levels up in one instruction.
    """

    kind = "fp4"
    group: int = 32
