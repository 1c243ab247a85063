"""6-bit integers."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.catalog import technique
from tightfit.weights.formats.tiles import Integers


@technique(
    seam="weights",
    name="int6",
    paper="https://arxiv.org/abs/2308.09723",
    exact=False,
    summary="6-bit integers, a scale for each row and group of inputs",
)
@dataclass(frozen=True)
class Int6(Integers):
    """Rounding to 64 levels, -32 to 31, as :class:`~tightfit.weights.formats.int4.Int4` does with 16."""

    kind = "int6"
