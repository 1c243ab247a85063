"""Tasks that ask for what the prompt says."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from tightfit.lab.tasks.base import Metric, Reference, Sample, Task, fitting, lengths, positive
from tightfit.zoo import tasks as texts

if TYPE_CHECKING:
    from tightfit.lab.material import Material
    from tightfit.lab.reader import Reader


class Asking(Task):
    """The answer is known, and fed as it should be. ``correct``: each of its tokens is the most likely one at its
    place, which is to say that greedy decoding would write it exactly. ``log_probability``: of the answer, the mean
    over its tokens; it moves before answers become wrong."""

    metrics: ClassVar = (Metric("correct", "share", "higher"), Metric("log_probability", "nats", "higher"))

    def measure(self, reader: Reader, sample: Sample, exact: Reference | None) -> dict[str, Any]:
        from tightfit.lab.rows import log_probability

        correct, total = True, 0.0
        for row, token in zip(reader.follow(sample.prompt, sample.following), sample.following, strict=True):
            correct = correct and int(row.argmax()) == token
            total += log_probability(row, token)
        return {"correct": int(correct), "log_probability": total / len(sample.following)}


def asked(material: Material, before: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a text and of the answer behind it: as the tokenizer writes it there, or on its own where it would
    write the text before differently."""
    prompt, both = material.encode(before), material.encode(before + answer)
    following = both[len(prompt) :] if both[: len(prompt)] == prompt else material.encode(answer)
    return [*material.begin, *prompt], following


@dataclass(frozen=True)
class Written(Asking):
    """Texts and questions of :mod:`tightfit.zoo.tasks`: one question about each of ``questions`` texts of about so many
    ``tokens``, numbers or shares of the context."""

    form: ClassVar[str]
    questions: int = 12
    tokens: str = "25%/50%/90%"

    def __post_init__(self) -> None:
        positive(self, "questions")
        lengths(self.tokens, "tokens")

    def samples(self, material: Material, context: int, seed: int) -> list[Sample]:
        return list(self._samples(material, context, seed))

    def _samples(self, material: Material, context: int, seed: int) -> Iterable[Sample]:
        for tokens in lengths(self.tokens, "tokens", context):
            for number in range(self.questions):
                key = f"{self.form}/{tokens}/{number}"
                prompt, following = fitting(partial(self._write, material, f"{seed}/{key}"), tokens, context)
                yield Sample(key, {"form": self.form, "tokens": tokens}, prompt, following)

    def _write(self, material: Material, seed: str, tokens: int) -> tuple[list[int], list[int]]:
        example = texts.TASKS[self.form](random.Random(seed), material.examples, tokens)
        question = next(example.questions)
        return asked(material, example.context + question.prompt, question.answer)
