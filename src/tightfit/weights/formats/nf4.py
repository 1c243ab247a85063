"""4-bit NormalFloat."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.catalog import technique
from tightfit.weights.formats.tiles import Tiled


@technique(
    seam="weights",
    name="nf4",
    paper="https://arxiv.org/abs/2305.14314",
    exact=False,
    summary="4-bit NormalFloat: levels at the quantiles of a normal distribution",
)
@dataclass(frozen=True)
class NF4(Tiled):
    """QLoRA's 16 levels, made so that weights with a normal distribution use each of them equally often.

    It departs from QLoRA in the scale: bfloat16 for each group of a row instead of an 8-bit number for 64 weights (its
    double quantisation), and of the smallest squared error instead of the largest magnitude. It may be negative, since
    there are 7 levels below zero and 8 above.
    """

    kind = "nf4"
    group: int = 32
