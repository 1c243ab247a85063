"""8-bit integers."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.catalog import technique
from tightfit.weights.formats.tiles import Integers


@technique(
    seam="weights",
    name="int8",
    paper="https://arxiv.org/abs/2208.07339",
    exact=False,
    summary="8-bit integers, a scale for each row and group of inputs or, with group=0, for each row",
)
@dataclass(frozen=True)
class Int8(Integers):
    """Rounding to 255 levels, -127 to 127: with ``group=0`` the vector-wise quantisation of LLM.int8().

    It departs from that in the scale, which is the best of a few around the largest magnitude, and in that outliers
    have no path of their own (that is ``llm_int8``). The error is half a step at most, and somewhat more where clipping
    a group's extremes pays.
    """

    kind = "int8"
