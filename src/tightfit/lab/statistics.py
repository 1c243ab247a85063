"""Intervals: how far what was measured on some samples may be from what it is on all.

All are 95% intervals. Most are percentile bootstrap intervals (Efron and Tibshirani, "An Introduction to the
Bootstrap", chapter 13): the samples are drawn anew, with replacement, 2000 times, the statistic is computed of each
draw, and the interval leaves out 2.5% on either side. It needs no assumption on how values are distributed; of fewer
than about 20 samples it is somewhat too narrow. Where resampling can't show what was not seen, it isn't used:

- one sample has no interval, and neither has a maximum;
- samples that are all right, or all wrong, would give an interval of no width, as if nothing else could happen: shares
  of which all are 0, or all are 1, get Wilson's score interval, in which each sample is one trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Statistic = Callable[[Array], Array]  # rows of samples (..., n, k) -> (...)

RESAMPLES = 2000
TAIL = 2.5  # percent
Z = 1.959963984540054  # the normal quantile that leaves out as much
AT_ONCE = 1 << 20  # numbers that are resampled at once: 8 MiB


@dataclass(frozen=True)
class Estimate:
    """``value`` of ``samples`` samples, and the interval from ``low`` to ``high``, where there is one."""

    value: float
    low: float | None
    high: float | None
    samples: int


def mean(rows: Array) -> Array:
    """Of the first number of each sample."""
    found: Array = rows[..., 0].mean(-1)
    return found


def median(rows: Array) -> Array:
    """Of the first number of each sample."""
    found: Array = np.median(rows[..., 0], axis=-1)
    return found


def maximum(rows: Array) -> Array:
    """Of the first number of each sample."""
    found: Array = rows[..., 0].max(-1)
    return found


def ratio(rows: Array) -> Array:
    """The sum of the first numbers over that of the second ones, 0 where that is 0."""
    sums = rows.sum(-2)
    found: Array = sums[..., 0] / np.where(sums[..., 1] == 0, np.inf, sums[..., 1])
    return found


STATISTICS: dict[str, Statistic] = {"mean": mean, "median": median, "max": maximum}


def estimate(
    rows: Sequence[Sequence[float]], statistic: Statistic = mean, *, share: bool = False, seed: int = 0
) -> Estimate:
    """The statistic of samples, each a row of k numbers. ``share`` says that it lies between 0 and 1."""
    values = np.asarray(rows, np.float64)
    value = float(statistic(values))
    if share and value in (0, 1):
        low, high = wilson(int(value) * len(values), len(values))
        return Estimate(value, low, high, len(values))
    return Estimate(value, *_bootstrap(values, statistic, seed), len(values))


def difference(
    rows: Sequence[Sequence[float]],
    others: Sequence[Sequence[float]],
    statistic: Statistic = mean,
    *,
    share: bool = False,
    seed: int = 0,
) -> Estimate:
    """The statistic of ``rows`` less that of ``others``, which come from the same samples in the same order: both are
    resampled alike. Shares that are the same on every sample, or all right for one and all wrong for the other, get
    Wilson's bound for how many samples might be otherwise.

    Raises ValueError where there are more of one than of the other.
    """
    first, second = np.asarray(rows, np.float64), np.asarray(others, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"{first.shape} and {second.shape} are no pairs")
    columns = first.shape[-1]
    both = np.concatenate([first, second], axis=-1)

    def less(pairs: Array) -> Array:
        return statistic(pairs[..., :columns]) - statistic(pairs[..., columns:])

    value = float(less(both))
    if share and ((first == second).all() or abs(value) == 1):
        _, most = wilson(0, len(first))
        most *= 1 + abs(value)  # both may be otherwise
        return Estimate(value, max(value - most, -1.0), min(value + most, 1.0), len(first))
    low, high = (None, None) if statistic is maximum else _bootstrap(both, less, seed)
    return Estimate(value, low, high, len(first))


def wilson(right: int, trials: int) -> tuple[float, float]:
    """Wilson's score interval of a share, of which ``right`` of ``trials`` were seen."""
    share, slack = right / trials, Z * Z / trials
    centre = (share + slack / 2) / (1 + slack)
    half = math.sqrt(share * (1 - share) * slack + slack * slack / 4) / (1 + slack)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _bootstrap(values: Array, statistic: Statistic, seed: int) -> tuple[float | None, float | None]:
    count = len(values)
    if count < 2 or statistic is maximum:
        return None, None
    rng = np.random.default_rng(seed)
    drawn, at_once = [], max(1, AT_ONCE // values.size)
    for start in range(0, RESAMPLES, at_once):
        indices = rng.integers(0, count, (min(at_once, RESAMPLES - start), count))
        drawn.append(statistic(values[indices]))
    low, high = np.percentile(np.concatenate(drawn), [TAIL, 100 - TAIL])
    return float(low), float(high)
