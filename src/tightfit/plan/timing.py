"""How measurements of a shared machine are summed up."""

from __future__ import annotations

from collections.abc import Sequence

LUCK = 0.1  # share by which a measurement may be too fast


def typical(seconds: Sequence[float]) -> float:
    """The lower quartile, but not much above the fastest: luck makes few measurements shorter, and other work on the
    machine makes most of them longer."""
    return min(sorted(seconds)[len(seconds) // 4], (1 + LUCK) * min(seconds))
