"""Placement: hands the decoder a layer's parameters when it needs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any


class Placement(ABC):
    """Where the parameters lie. ``model`` holds those outside of the layers.

    A parameter is a :class:`~tightfit.weights.formats.base.Matrix` or a float32 vector, or for a mixture's experts
    something that gives one for each expert when indexed, under the name that the architecture gives it.
    """

    model: Mapping[str, Any]

    @abstractmethod
    def layer(self, index: int) -> AbstractContextManager[Mapping[str, Any]]:
        """The parameters of layer ``index``, valid inside the context."""
