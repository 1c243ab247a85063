"""What a cache of experts is told of itself: which experts are worth keeping, and which will be wanted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tightfit.catalog import parse
from tightfit.errors import UsageError

if TYPE_CHECKING:
    import torch

    from tightfit.experts.census import Census


class Ranking(ABC):
    """``worth``: (layers, experts) float64, what each expert is worth keeping. Where room is needed, the one that is
    worth least goes."""

    def __init__(self, layers: int, experts: int) -> None:
        import torch

        self.worth = torch.zeros(layers, experts, dtype=torch.float64)

    def first(self, slots: int) -> list[tuple[int, int]]:
        """At most ``slots`` (layer, expert) that are worth having before the first token."""
        return []

    @abstractmethod
    def used(self, layer: int, experts: list[int], scores: torch.Tensor) -> None:
        """A step wants ``experts`` of ``layer``, whose router gave its tokens ``scores`` (tokens, experts), each row
        of sum 1."""


class Policy(ABC):
    """Which experts stay in memory. Subclasses are frozen dataclasses; their fields are their settings."""

    name: ClassVar[str]  # set by the catalog
    needs_census: ClassVar[bool] = False

    @abstractmethod
    def ranking(self, layers: int, experts: int, per_token: int, census: Census | None) -> Ranking:
        """A ranking of ``experts`` experts in each of ``layers`` mixtures, of which a token chooses ``per_token``,
        before any was used. ``census`` is there if the policy needs one."""


class Predictor(ABC):
    """Which experts the next mixture will want. There is one, :class:`~tightfit.experts.gate.Gate`; the model asks the
    next router itself, since it knows how to."""

    name: ClassVar[str]  # set by the catalog


@dataclass(frozen=True)
class Scheme:
    """A policy, and whether experts are read ahead."""

    policy: Policy
    ahead: bool


def scheme(text: str) -> Scheme:
    """What a spec string such as ``score+gate`` says. Raises UsageError unless it names one policy and at most one
    predictor."""
    parts: list[Any] = parse("experts", text)
    policies = [part for part in parts if isinstance(part, Policy)]
    predictors = [part for part in parts if isinstance(part, Predictor)]
    if len(policies) != 1 or len(predictors) > 1:
        raise UsageError(
            f"{text!r} names {len(policies)} policies and {len(predictors)} predictors for experts",
            "Give one policy, and a predictor beside it if you want one: lru, lfu+gate, score+gate.",
        )
    return Scheme(policies[0], bool(predictors))
