"""Placement: hands the decoder a layer's parameters when it needs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from tightfit.model.spec import MoeSpec
from tightfit.weights.formats.base import Joined

OF_EXPERTS = "experts."  # what the names of their parameters begin with
EXPERT_OBJECTS = 6 << 10  # bytes that the objects take through which an expert's matrices are used


class Experts(ABC):
    """The experts of a layer's mixture.

    ``following``: the next mixture and its router, where it is guessed what that will choose. ``activated`` (experts,)
    int64 counts the tokens that chose each, where that is counted.
    """

    following: tuple[MoeSpec, Parameters] | None = None
    activated: torch.Tensor | None = None

    def want(self, experts: Mapping[int, int], scores: torch.Tensor) -> None:
        """A step will use ``experts``, in their order; of each it is said how many tokens chose it. ``scores`` (tokens,
        experts) are the router's: logits where the spec's scoring is ``topk_softmax``."""
        if self.activated is not None:
            for expert, tokens in experts.items():
                self.activated[expert] += tokens

    def expect(self, experts: Sequence[int]) -> None:  # noqa: B027
        """The next mixture will probably want ``experts``."""

    @abstractmethod
    def use(self, expert: int) -> AbstractContextManager[Parameters]:
        """The parameters of one expert, under their names without ``experts.``, valid inside the context."""


class Parameters(dict[str, Any]):
    """Parameters by name: a :class:`~tightfit.weights.formats.base.Matrix` or a float32 vector each. ``experts`` are
    those of a layer's mixture."""

    def __init__(self, parameters: Mapping[str, Any], experts: Experts | None = None) -> None:
        super().__init__(parameters)
        self.experts = experts
        self._joined: dict[tuple[str, ...], Joined] = {}

    def joined(self, *names: str) -> Joined:
        """The matrices ``names``, to be multiplied with the same input."""
        known = self._joined.get(names)
        if known is None:
            known = self._joined[names] = Joined([self[name] for name in names])
        return known


class StackedExperts(Experts):
    """Experts all of which are at hand: ``stacks`` have one parameter for each of them when indexed."""

    def __init__(self, stacks: Mapping[str, Any]) -> None:
        self._stacks = stacks
        self._made: dict[int, Parameters] = {}  # making them takes longer than reading a small expert

    @contextmanager
    def use(self, expert: int) -> Iterator[Parameters]:
        if expert not in self._made:
            self._made[expert] = Parameters({name: stack[expert] for name, stack in self._stacks.items()})
        yield self._made[expert]


def layer_parameters(parameters: Mapping[str, Any]) -> Parameters:
    """The parameters of a layer, of which those named ``experts.`` are stacks."""
    others: dict[str, Any] = {}
    stacks: dict[str, Any] = {}
    for name, value in parameters.items():
        of_experts = name.startswith(OF_EXPERTS)
        (stacks if of_experts else others)[name.removeprefix(OF_EXPERTS)] = value
    return Parameters(others, StackedExperts(stacks) if stacks else None)


class Placement(ABC):
    """Where the parameters lie. ``model`` holds those outside of the layers, under the names that the architecture
    gives them. ``fixed``: all of them stay where they are for as long as the placement lives."""

    model: Parameters
    fixed: bool

    @property
    def used_bytes(self) -> int:
        """How many bytes had to come from the disk for all uses of layers and of the head."""
        return 0

    @property
    def waited_seconds(self) -> float:
        """How long they were waited for."""
        return 0.0

    @property
    def expert_counts(self) -> Counter[str]:
        """What :class:`tightfit.experts.cache.ExpertCache` counts; nothing where experts are not cached."""
        return Counter()

    @abstractmethod
    def load(self, progress: Callable[[int], None] = lambda nbytes: None) -> None:
        """Reads and converts what stays in memory; ``progress`` is told of bytes."""

    def close(self) -> None:  # noqa: B027
        """Ends what reads ahead."""

    def begin(self, logits: bool) -> None:  # noqa: B027
        """Told before each pass over the layers: whether the head will be used after it."""

    @abstractmethod
    def layer(self, index: int) -> AbstractContextManager[Parameters]:
        """The parameters of layer ``index``, valid inside the context."""
