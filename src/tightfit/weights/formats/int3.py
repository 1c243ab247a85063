"""3-bit integers."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.catalog import technique
from tightfit.weights.formats.tiles import Integers


@technique(
    seam="weights",
    name="int3",
    paper="https://arxiv.org/abs/2308.09723",
    exact=False,
    summary="3-bit integers, a scale for each row and group of inputs",
)
@dataclass(frozen=True)
class Int3(Integers):
    """Rounding to 8 levels, -4 to 3, as :class:`~tightfit.weights.formats.int4.Int4` does with 16."""

    kind = "int3"
