"""2-bit integers."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.catalog import technique
from tightfit.weights.formats.tiles import Integers


@technique(
    seam="weights",
    name="int2",
    paper="https://arxiv.org/abs/2308.09723",
    exact=False,
    summary="2-bit integers, a scale for each row and group of inputs",
)
@dataclass(frozen=True)
class Int2(Integers):
    """Rounding to 4 levels, -2 to 1, as :class:`~tightfit.weights.formats.int4.Int4` does with 16; the scale may be
    negative, which turns them into -1 to 2. Rounding alone loses a model's quality here: it is what calibrated methods
    write.
    """

    kind = "int2"
