"""Seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

from tightfit.catalog import technique
from tightfit.lab.tasks.base import Metric, Reference, Sample, Task, Values, lengths, positive
from tightfit.lab.tasks.texts import continued

if TYPE_CHECKING:
    from tightfit.lab.material import Material
    from tightfit.lab.reader import Reader


@technique(
    seam="tasks",
    name="latency",
    paper="",
    exact=True,
    summary="time to the first token and for each further one, by context",
)
@dataclass(frozen=True)
class Latency(Task):
    """``first_token``: from the prompt to the logits of the first token. ``token``: of each of the ``new`` ones after
    it, the mean, whatever a cache does every few tokens included. Both are medians of ``repetitions``, after one that
    is not counted, for each length in ``tokens``. Right tokens are fed, so that all configurations compute the same;
    what sampling takes is left out."""

    repetitions: int = 5
    new: int = 32
    tokens: str = "10%/50%/95%"

    metrics: ClassVar = (Metric("first_token", "s", "lower", "median"), Metric("token", "s", "lower", "median"))

    def __post_init__(self) -> None:
        positive(self, "repetitions", "new")
        lengths(self.tokens, "tokens")

    def samples(self, material: Material, context: int, seed: int) -> list[Sample]:
        following = self.new + 1  # the last one is predicted, and not computed
        prompts = lengths(self.tokens, "tokens", context, besides=following)
        return list(continued(self, material, seed, prompts, 1, following))

    def measure(self, reader: Reader, sample: Sample, exact: Reference | None) -> dict[str, Any]:
        _, *times = [_seconds(reader, sample) for _ in range(1 + self.repetitions)]
        first, token = zip(*times, strict=True)
        return {"first_token": median(first), "token": median(token), "repetitions": [list(pair) for pair in times]}

    def rows(self, metric: Metric, values: Sequence[Values]) -> list[list[float]]:
        column = self.metrics.index(metric)
        return [[times[column]] for found in values for times in found["repetitions"]]


def _seconds(reader: Reader, sample: Sample) -> tuple[float, float]:
    """To the first token, and for each of the others."""
    rows = reader.follow(sample.prompt, sample.following)
    started = time.perf_counter()
    next(rows)
    first = time.perf_counter()
    steps = sum(1 for _ in rows)
    return first - started, (time.perf_counter() - first) / steps
