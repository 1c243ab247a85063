"""Samples of real text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.lab.tasks.base import Sample, Task, lengths, positive

if TYPE_CHECKING:
    from tightfit.lab.material import Material


def continued(
    task: Task, material: Material, seed: int, prompts: list[int], count: int, following: int
) -> Iterator[Sample]:
    """``count`` random places in the texts for each length of the prompt, and the tokens that follow."""
    for tokens in prompts:
        for index in range(count):
            key = f"{tokens}/{index}"
            text = material.continued(random.Random(f"{seed}/{task.name}/{key}"), tokens, following)
            yield Sample(key, {"tokens": tokens}, *text)


@dataclass(frozen=True)
class Compared(Task):
    """The ``follow`` tokens behind each of ``texts`` prompts of each length in ``tokens``, numbers or shares of the
    context, beside what the exact model says of them."""

    texts: int = 12
    follow: int = 64
    tokens: str = "6%/25%/95%"

    needs_reference: ClassVar = True

    def __post_init__(self) -> None:
        positive(self, "texts", "follow")
        lengths(self.tokens, "tokens")

    def samples(self, material: Material, context: int, seed: int) -> list[Sample]:
        prompts = lengths(self.tokens, "tokens", context, besides=self.follow)
        return list(continued(self, material, seed, prompts, self.texts, self.follow))
