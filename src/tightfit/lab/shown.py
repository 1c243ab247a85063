"""Numbers as people read them, the same on the page, on the terminal and in the catalog."""

from __future__ import annotations

import math

from tightfit.budget.units import MiB


def number(value: float, unit: str) -> str:
    """With as many digits as tell something: shares in percent, bytes in MiB, seconds in milliseconds below one."""
    if unit == "share":
        return f"{value:.1%}"
    if unit == "bytes":
        return f"{value / MiB:.1f} MiB"
    if unit == "s":
        return f"{digits(value * 1000)} ms" if abs(value) < 1 else f"{digits(value)} s"
    if unit == "operations":
        return f"{digits(value / 1e6)} M"
    return digits(value)


def digits(value: float) -> str:
    """Three of them, and at most five behind the point."""
    if abs(value) < 5e-6:
        return "0"
    return f"{value:.{min(max(2 - math.floor(math.log10(abs(value))), 0), 5)}f}"


def interval(low: float | None, high: float | None, unit: str) -> str:
    """``low`` to ``high``, and nothing where there is no interval."""
    return "" if low is None or high is None else f"{number(low, unit)} to {number(high, unit)}"
