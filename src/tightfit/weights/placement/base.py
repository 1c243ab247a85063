"""Placement: hands the decoder a layer's parameters when it needs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from tightfit.weights.formats.base import Joined


class Parameters(dict[str, Any]):
    """Parameters by name: a :class:`~tightfit.weights.formats.base.Matrix` or a float32 vector each, or for a mixture's
    experts something that gives one for each expert when indexed."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        super().__init__(parameters)
        self._joined: dict[tuple[str, ...], Joined] = {}

    def joined(self, *names: str) -> Joined:
        """The matrices ``names``, to be multiplied with the same input."""
        known = self._joined.get(names)
        if known is None:
            known = self._joined[names] = Joined([self[name] for name in names])
        return known


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
