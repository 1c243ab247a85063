"""5-bit integers."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.catalog import technique
from tightfit.weights.formats.tiles import Integers


@technique(
    seam="weights",
    name="int5",
    paper="https://arxiv.org/abs/2308.09723",
    exact=False,
    summary="5-bit integers, a scale for each row and group of inputs",
)
@dataclass(frozen=True)
class Int5(Integers):
    """Rounding to 32 levels, -16 to 15, as :class:`~tightfit.weights.formats.int4.Int4` does with 16."""

    kind = "int5"
