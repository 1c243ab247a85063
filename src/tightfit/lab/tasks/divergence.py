"""How far distributions are from the exact model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tightfit.catalog import technique
from tightfit.lab.tasks.base import Metric, Reference, Sample
from tightfit.lab.tasks.texts import Compared

if TYPE_CHECKING:
    from tightfit.lab.reader import Reader


@technique(
    seam="tasks",
    name="divergence",
    paper="https://arxiv.org/abs/2407.09141",
    exact=True,
    summary="KL divergence from the exact model, and how often the first choice is the same",
)
@dataclass(frozen=True)
class Divergence(Compared):
    """The Kullback-Leibler divergence KL(exact || this) of next-token distributions, a mean over the ``follow`` tokens
    behind a prompt of real text, and the share of those tokens at which both find the same one most likely: distances
    from the model as it is show what accuracies hide ("Accuracy is Not All You Need")."""

    metrics: ClassVar = (Metric("kl", "nats", "lower"), Metric("agreement", "share", "higher"))

    def measure(self, reader: Reader, sample: Sample, exact: Reference | None) -> dict[str, Any]:
        from tightfit.lab.rows import divergence

        assert exact is not None
        total, agreed = 0.0, 0
        for index, row in enumerate(reader.follow(sample.prompt, sample.following)):
            other = exact.logits(index)
            total += divergence(other, row)
            agreed += int(row.argmax()) == int(other.argmax())
        count = len(sample.following)
        return {"kl": total / count, "agreement": agreed / count}
