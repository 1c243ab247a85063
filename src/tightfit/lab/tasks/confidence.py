"""How sure a model is, and how rightly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tightfit.catalog import technique
from tightfit.lab.statistics import Array, Statistic, ratio
from tightfit.lab.tasks.base import Metric, Reference, Sample, Values
from tightfit.lab.tasks.texts import Compared

if TYPE_CHECKING:
    from tightfit.lab.reader import Reader

BINS = 10  # of confidence, for the calibration error
QUARTERS = 4  # of the exact model's confidence, by which shifts and flips are told apart
LOWEST = [100 * quarter // QUARTERS for quarter in range(QUARTERS)]


@technique(
    seam="tasks",
    name="confidence",
    paper="https://arxiv.org/abs/2405.00632",
    exact=True,
    summary="probability of the true token, calibration, and how both move where the exact model is unsure",
)
@dataclass(frozen=True)
class Confidence(Compared):
    """After "When Quantization Affects Confidence of Large Language Models?", on the tokens that follow in real text:

    - ``true_probability`` of the token that really comes, and its ``shift`` from what the exact model gives it;
    - ``flips``, the share of tokens of which another one is the most likely than for the exact model;
    - both by the exact model's confidence, the probability of its first choice: ``shift_0`` is that where it is below
      25%, ``shift_75`` that from 75% on;
    - ``ece``, the expected calibration error (Guo et al., https://arxiv.org/abs/1706.04599): how far the confidence of
      first choices is from the share of them that is right, in 10 bins of equal width, weighed by their tokens.

    It departs from the paper in that labels are the next tokens of a text instead of answers to multiple choice.
    """

    metrics: ClassVar = (
        Metric("true_probability", "probability", "higher"),
        Metric("ece", "probability", "lower"),
        Metric("shift", "probability", "higher"),
        *(Metric(f"shift_{lowest}", "probability", "higher") for lowest in LOWEST),
        Metric("flips", "share", "lower"),
        *(Metric(f"flips_{lowest}", "share", "lower") for lowest in LOWEST),
    )

    def measure(self, reader: Reader, sample: Sample, exact: Reference | None) -> dict[str, Any]:
        from tightfit.lab.rows import log_probability

        assert exact is not None
        true = shift = 0.0
        calibration = np.zeros((BINS, 3))  # tokens, sum of confidences, how many right
        quarters = np.zeros((QUARTERS, 3))  # tokens, sum of shifts, flips
        rows = reader.follow(sample.prompt, sample.following)
        for index, (row, token) in enumerate(zip(rows, sample.following, strict=True)):
            other = exact.logits(index)
            first, others_first = int(row.argmax()), int(other.argmax())
            probability, confidence, before, others_confidence = (
                math.exp(log_probability(*of))
                for of in ((row, token), (row, first), (other, token), (other, others_first))
            )
            true += probability
            shift += probability - before
            calibration[_bin(confidence, BINS)] += 1, confidence, first == token
            flipped = first != others_first
            quarters[_bin(others_confidence, QUARTERS)] += 1, probability - before, flipped
        count = len(sample.following)
        found = {
            "true_probability": true / count,
            "ece": float(_calibration_error(calibration.ravel()[None])),
            "shift": shift / count,
            "flips": float(quarters[:, 2].sum() / count),
            "calibration": calibration.tolist(),
            "quarters": quarters.tolist(),
        }
        for lowest, (tokens, shifts, flips) in zip(LOWEST, quarters.tolist(), strict=True):
            found[f"shift_{lowest}"] = shifts / tokens if tokens else None
            found[f"flips_{lowest}"] = flips / tokens if tokens else None
        return found

    def rows(self, metric: Metric, values: Sequence[Values]) -> list[list[float]]:
        kind, _, lowest = metric.name.partition("_")
        if kind == "ece":
            return [np.ravel(found["calibration"]).tolist() for found in values]
        if not lowest or kind == "true":
            return super().rows(metric, values)
        tokens = [found["quarters"][LOWEST.index(int(lowest))] for found in values]
        rows = [[shifts if kind == "shift" else flips, count] for count, shifts, flips in tokens]
        return rows if any(count for _, count in rows) else []

    def statistic(self, metric: Metric) -> Statistic:
        if metric.name == "ece":
            return _calibration_error
        return ratio if metric.name.startswith(("shift_", "flips_")) else super().statistic(metric)


def _bin(probability: float, bins: int) -> int:
    return min(int(probability * bins), bins - 1)


def _calibration_error(rows: Array) -> Array:
    """Of samples whose rows are (tokens, sum of confidences, right) for each bin."""
    bins = rows.sum(-2).reshape(*rows.shape[:-2], BINS, 3)
    found: Array = np.abs(bins[..., 1] - bins[..., 2]).sum(-1) / bins[..., 0].sum(-1)
    return found
