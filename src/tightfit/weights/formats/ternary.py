"""Ternary weights."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.catalog import technique
from tightfit.weights.formats.tiles import Tiled


@technique(
    seam="weights",
    name="ternary",
    paper="https://arxiv.org/abs/2410.16144",
    exact=False,
    summary="-1, 0 and 1 in 1.67 bits, a scale for each row and group of inputs",
)
@dataclass(frozen=True)
class Ternary(Tiled):
    """The three levels of BitNet b1.58 (https://arxiv.org/abs/2402.17764), packed after bitnet.cpp's TL2: three weights
    in a sign and a number from 0 to 13, 5 bits.

    A ternary matrix is held exactly, whatever its scale, if that is a bfloat16. Others are rounded to it: BitNet takes
    the mean magnitude of the whole matrix for the scale; here it is where the search for each group's begins. It
    departs from TL2 in what lies beside what, so that a register has a lane for each row as with all other formats, and
    the products are sums, not table look-ups.
    """

    kind = "ternary"
    multiple = 48
    group: int = 96
