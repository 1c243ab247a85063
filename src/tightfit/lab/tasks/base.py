"""What the lab asks of a task, and what a task gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from tightfit.errors import UsageError
from tightfit.lab import statistics
from tightfit.lab.statistics import Estimate

if TYPE_CHECKING:
    import torch

    from tightfit.lab.material import Material
    from tightfit.lab.reader import Reader

Values = dict[str, Any]  # what came of one sample: JSON-ready, a number (or None) for each metric, and details


@dataclass(frozen=True)
class Metric:
    """One number of a sample. With unit ``share`` it lies between 0 and 1; ``summary`` says what stands for many."""

    name: str
    unit: str
    better: Literal["higher", "lower"]
    summary: Literal["mean", "median", "max"] = "mean"


@dataclass(frozen=True)
class Sample:
    """One thing to measure on. ``key`` is unique within the task, ``group`` is what results are shown by. Token ids of
    the ``prompt``, and of what is ``following`` it or how many ``new_tokens`` the exact model is to add greedily.
    """

    key: str
    group: dict[str, int | str]
    prompt: list[int]
    following: list[int]
    new_tokens: int = 0


class Reference(Protocol):
    """What the exact model gave on a sample."""

    def logits(self, index: int) -> torch.Tensor:
        """(vocab,) float32: what predicts ``following[index]``, as :meth:`Reader.follow` gives it."""
        ...

    @property
    def tokens(self) -> list[int]:
        """The ``new_tokens`` that it adds greedily."""
        ...


class Task(ABC):
    """A kind of measurement: a frozen dataclass whose fields are its settings, registered in the seam ``tasks``.

    With ``needs_reference`` the exact model goes through the samples first: through what is ``following``, or for as
    many ``new_tokens`` as are asked for.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    needs_reference: ClassVar[bool] = False

    @abstractmethod
    def samples(self, material: Material, context: int, seed: int) -> list[Sample]:
        """The same for the same arguments and settings. No sample takes more than ``context`` tokens. Raises UsageError
        where the settings want more, or the material has less."""

    @abstractmethod
    def measure(self, reader: Reader, sample: Sample, exact: Reference | None) -> Values:
        """What comes of one sample: a number for each metric, None where there is none, and details."""

    def rows(self, metric: Metric, values: Sequence[Values]) -> list[list[float]]:
        """Of each sample that has it, the numbers that :meth:`statistic` works on: by default the metric."""
        return [[found[metric.name]] for found in values if found[metric.name] is not None]

    def statistic(self, metric: Metric) -> statistics.Statistic:
        """What stands for many samples: rows (..., n, k) -> (...)."""
        return statistics.STATISTICS[metric.summary]

    def summarise(self, values: Sequence[Values]) -> dict[str, Estimate]:
        """Each metric over samples, with a 95% interval; metrics that no sample has are left out."""
        found = {}
        for metric in self.metrics:
            if rows := self.rows(metric, values):
                found[metric.name] = statistics.estimate(rows, self.statistic(metric), share=metric.unit == "share")
        return found

    def compare(self, values: Sequence[Values], others: Sequence[Values]) -> dict[str, Estimate]:
        """Each metric of ``values`` less that of ``others``, which come from the same samples in the same order, with a
        95% interval of the difference: narrower than those of the two, since samples are as hard for both."""
        found = {}
        for metric in self.metrics:
            pairs = [self.rows(metric, each) for each in (values, others)]
            if pairs[0] and len(pairs[0]) == len(pairs[1]):
                share = metric.unit == "share"
                found[metric.name] = statistics.difference(pairs[0], pairs[1], self.statistic(metric), share=share)
        return found


def numbers(text: str, setting: str) -> list[float]:
    """The numbers of a setting that is a list, ``"0/50/100"``. Raises UsageError for anything else."""
    try:
        return [float(part) for part in text.split("/")]
    except ValueError:
        raise UsageError(
            f"{setting} cannot be {text!r}", f"Write numbers with / between them: {setting}=1/2."
        ) from None


def lengths(text: str, setting: str, context: int = 1 << 30, besides: int = 0) -> list[int]:
    """The numbers of tokens that a setting names: ``"512/25%"`` are 512 and a quarter of the context, the latter cut to
    what ``besides`` tokens leave of it. Raises UsageError for anything else, and for a number that does not fit."""
    found, most = [], context - besides
    for part in text.split("/"):
        share = part.endswith("%")
        try:
            tokens = min(int(float(part[:-1]) / 100 * context), most) if share else int(part)
        except ValueError:
            tokens = 0
        if tokens > most or most < 1:
            raise UsageError(
                f"{setting}={part} does not fit into {context} tokens of context with {besides} more",
                f"Give at most {most} tokens, or a longer --context." if most > 0 else "Give a longer --context.",
            )
        if tokens < 1:
            hint = f"Write numbers of tokens or shares of the context with / between them: {setting}=512/50%."
            raise UsageError(f"{setting} cannot be {text!r}", hint)
        found.append(tokens)
    return sorted(set(found))


def positive(task: object, *settings: str) -> None:
    """Raises UsageError for a setting that is not above zero."""
    for setting in settings:
        if getattr(task, setting) <= 0:
            raise UsageError(f"{setting} cannot be {getattr(task, setting)}", "Give a number above zero.")


Making = Callable[[int], "tuple[list[int], list[int]]"]  # tokens -> prompt, following


def fitting(make: Making, tokens: int, context: int) -> tuple[list[int], list[int]]:
    """What ``make`` gives for ``tokens``, or for as many fewer as let it fit into the context: how many tokens a text
    really has is known once it is written."""
    wanted = tokens
    while wanted > 0:
        prompt, following = make(wanted)
        excess = len(prompt) + len(following) - context
        if excess <= 0:
            return prompt, following
        wanted -= excess
    raise UsageError(f"no text of {tokens} tokens fits into {context} tokens of context", "Give a longer --context.")
