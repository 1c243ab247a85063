"""How fast a machine computes, as plain numbers: what `plan/profile.py` measured and `budget/machine.py` keeps.

All are seconds for one unit of work, so that they add up. Imports nothing heavy.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from tightfit.plan.schema import Numerics, Strict

VERSION: Literal[1] = 1
Curve = dict[int, float]  # by a number of rows, tokens, heads, threads or bytes


def at(curve: Mapping[int, float], place: float) -> float:
    """The value of a measured curve at ``place``: straight lines between what was measured, and beyond its ends the
    last value."""
    known = sorted(curve)
    index = bisect_left(known, place)
    if index == 0 or index == len(known):
        return curve[known[min(index, len(known) - 1)]]
    low, high = known[index - 1], known[index]
    share = (place - low) / (high - low)
    return curve[low] * (1 - share) + curve[high] * share


class FormatSpeed(Strict):
    """How fast matrices of one format are multiplied. ``vector``: seconds for each byte of the matrix, by how many
    tokens decode at once; ``product``: seconds for each weight, by the prompt tokens of a chunk."""

    bytes_per_weight: float
    vector: Curve
    product: Curve


class AttentionSpeed(Strict):
    """``decode``: seconds for each number of the keys and values of a token that one query looks at, by the heads that
    share them. ``prefill``: seconds for each query, head, key and feature of keys and values, by the tokens of a
    chunk."""

    decode: Curve
    prefill: Curve


class DiskSpeed(Strict):
    """Bytes per second of a cold file. ``streamed``: as streaming reads, several threads at once; ``blocks``: in order,
    by the bytes of a request."""

    streamed: float
    blocks: Curve


class Speeds(Strict):
    """What was measured with so many threads and these types.

    ``read``: bytes per second of memory, by threads. ``formats`` and ``attention`` are by spec string. ``layer``,
    ``step`` and ``token``: seconds for what a layer of a step, a step, and each number of a prompt token's hidden
    states take beside products and attention. ``disk`` is that of the model; None where it was not measured.
    """

    version: Literal[1] = VERSION
    threads: int = Field(ge=1)
    numerics: Numerics
    read: Curve
    formats: dict[str, FormatSpeed]
    attention: dict[str, AttentionSpeed]
    layer: float
    step: float
    token: float
    disk: DiskSpeed | None = None
