"""Numbers hidden in a text."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.lab.material import Material
from tightfit.lab.tasks.answers import Asking, asked
from tightfit.lab.tasks.base import Sample, fitting, lengths, numbers, positive
from tightfit.zoo.tasks import ASKED_NEEDLE, NEEDLE, number


@technique(
    seam="tasks",
    name="needle",
    paper="https://arxiv.org/abs/2404.06654",
    exact=True,
    summary="one of several numbers hidden in code, at a given depth",
)
@dataclass(frozen=True)
class Needle(Asking):
    """Sentences that give a word a number, hidden between lines of real text, and a question for one of them, after
    the needle in a haystack of Kamradt and the multiple keys of RULER.

    The one that is asked for lies at each of ``depths``, in percent of the text, the others (of ``needles`` in all)
    anywhere; ``questions`` texts for each depth, number of needles and length."""

    questions: int = 2
    tokens: str = "25%/90%"
    needles: str = "1/4"
    depths: str = "0/25/50/75/100"

    def __post_init__(self) -> None:
        positive(self, "questions")
        lengths(self.tokens, "tokens")
        if not all(0 <= depth <= 100 for depth in numbers(self.depths, "depths")):
            raise UsageError(f"depths cannot be {self.depths!r}", "They are percentages of the text: depths=0/50/100.")
        if not all(count >= 1 and count.is_integer() for count in numbers(self.needles, "needles")):
            raise UsageError(f"needles cannot be {self.needles!r}", "Write whole numbers above zero: needles=1/4.")

    def samples(self, material: Material, context: int, seed: int) -> list[Sample]:
        return list(self._samples(material, context, seed))

    def _samples(self, material: Material, context: int, seed: int) -> Iterator[Sample]:
        counts, depths = (numbers(text, "") for text in (self.needles, self.depths))
        cells = product(lengths(self.tokens, "tokens", context), map(int, counts), depths, range(self.questions))
        for tokens, needles, depth, index in cells:
            key = f"{tokens}/{needles}/{depth:g}/{index}"
            write = partial(_write, material, f"{seed}/needle/{key}", needles, depth)
            prompt, following = fitting(write, tokens, context)
            yield Sample(key, {"tokens": tokens, "needles": needles, "depth": round(depth)}, prompt, following)


def _write(material: Material, seed: str, needles: int, depth: float, tokens: int) -> tuple[list[int], list[int]]:
    rng = random.Random(seed)
    values = {word: number(rng) for word in rng.sample(material.examples.words, needles)}
    hidden = [NEEDLE.format(key, value) for key, value in values.items()]
    key, value = next(iter(values.items()))
    question = ASKED_NEEDLE.format(key)
    lines = material.examples.lines(rng, tokens - len(material.encode("".join(hidden) + question)))
    for other in hidden[1:]:
        lines.insert(rng.randint(0, len(lines)), other)
    ends = [0, *accumulate(map(len, lines))]
    lines.insert(bisect_left(ends, depth / 100 * ends[-1]), hidden[0])
    return asked(material, "".join(lines) + question, f"{value}\n")
