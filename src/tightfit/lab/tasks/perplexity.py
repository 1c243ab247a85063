"""How well text is predicted that is decoded token by token."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tightfit.catalog import technique
from tightfit.lab.material import text_bytes
from tightfit.lab.statistics import Array, Statistic, ratio
from tightfit.lab.tasks.base import Metric, Reference, Sample, Task, Values, lengths, positive

if TYPE_CHECKING:
    from tightfit.lab.material import Material
    from tightfit.lab.reader import Reader


@technique(
    seam="tasks",
    name="perplexity",
    paper="https://arxiv.org/abs/2101.00027",
    exact=True,
    summary="bits per byte of text, decoded through the cache",
)
@dataclass(frozen=True)
class Perplexity(Task):
    """Of each of ``windows`` places in the texts, ``after`` tokens are the prompt, and the next ``tokens`` are decoded
    one by one, the right one each time, and scored. What they cost in bits is divided by the bytes of text that they
    stand for (as in The Pile), which tokenizers can be compared by; ``perplexity`` is per token, which they can't.

    It departs from perplexity as it is mostly computed, by prefill of whole windows, where keys and values are never
    read from the compressed cache.
    """

    windows: int = 16
    tokens: int = 256
    after: str = "25%"

    metrics: ClassVar = (Metric("bits_per_byte", "bits/byte", "lower"), Metric("perplexity", "", "lower"))

    def __post_init__(self) -> None:
        positive(self, "windows", "tokens")
        lengths(self.after, "after")

    def samples(self, material: Material, context: int, seed: int) -> list[Sample]:
        found = []
        for after in lengths(self.after, "after", context, besides=self.tokens):
            for index in range(self.windows):
                key = f"{after}/{index}"
                text = material.continued(random.Random(f"{seed}/perplexity/{key}"), after, self.tokens)
                found.append(Sample(key, {"after": after}, *text))
        return found

    def measure(self, reader: Reader, sample: Sample, exact: Reference | None) -> dict[str, Any]:
        from tightfit.lab.rows import log_probability

        following = sample.following
        rows = zip(reader.follow(sample.prompt, following), following, strict=True)
        nats = -sum(log_probability(row, token) for row, token in rows)
        nbytes = text_bytes(reader.model.tokenizer, following)
        return {
            "bits_per_byte": nats / math.log(2) / nbytes if nbytes else None,
            "perplexity": math.exp(nats / len(following)),
            "nats": nats,
            "bytes": nbytes,
            "tokens": len(following),
        }

    def rows(self, metric: Metric, values: Sequence[Values]) -> list[list[float]]:
        if metric.name == "perplexity":
            return [[found["nats"], found["tokens"]] for found in values]
        return [[found["nats"] / math.log(2), found["bytes"]] for found in values if found["bytes"]]

    def statistic(self, metric: Metric) -> Statistic:
        return _perplexity if metric.name == "perplexity" else ratio


def _perplexity(rows: Array) -> Array:
    found: Array = np.exp(ratio(rows))
    return found
