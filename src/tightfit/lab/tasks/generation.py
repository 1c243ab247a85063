"""How long the greedy text agrees with the exact model's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from tightfit.catalog import technique
from tightfit.lab.tasks.base import Metric, Reference, Sample, Task, lengths, positive
from tightfit.lab.tasks.texts import continued

if TYPE_CHECKING:
    from tightfit.lab.material import Material
    from tightfit.lab.reader import Reader


@technique(
    seam="tasks",
    name="generation",
    paper="",
    exact=True,
    summary="how many greedy tokens are those of the exact model",
)
@dataclass(frozen=True)
class Generation(Task):
    """Greedy decoding of ``new`` tokens behind each of ``prompts`` places in the texts, for each length in ``tokens``.
    ``same_tokens`` counts those from the start on that the exact model writes too; ``same_share`` is the share of
    places with the same token: after the first difference the texts go their own ways, so it says little more than
    where that was."""

    prompts: int = 12
    new: int = 64
    tokens: str = "6%/50%"

    metrics: ClassVar = (Metric("same_tokens", "tokens", "higher"), Metric("same_share", "share", "higher"))
    needs_reference: ClassVar = True

    def __post_init__(self) -> None:
        positive(self, "prompts", "new")
        lengths(self.tokens, "tokens")

    def samples(self, material: Material, context: int, seed: int) -> list[Sample]:
        prompts = lengths(self.tokens, "tokens", context, besides=self.new)
        found = continued(self, material, seed, prompts, self.prompts, following=0)
        return [replace(sample, new_tokens=self.new) for sample in found]

    def measure(self, reader: Reader, sample: Sample, exact: Reference | None) -> dict[str, Any]:
        assert exact is not None
        pairs = list(zip(reader.greedy(sample.prompt, self.new), exact.tokens, strict=True))
        same = [one == other for one, other in pairs]
        return {"same_tokens": [*same, False].index(False), "same_share": sum(same) / self.new}
