"""Methods that store fewer features or heads than the model has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from tightfit.kv.fitted import Fitted

if TYPE_CHECKING:
    import torch

    from tightfit.kv.base import LayerLayout
    from tightfit.kv.lowrank.features import Maps
    from tightfit.kv.method import Method


class Projector(Fitted):
    """Linear maps of keys and values, in front of whatever the rest of a composition does with them."""

    roles: ClassVar[tuple[str, ...]] = ("features",)
    changes: ClassVar[tuple[str, ...]] = ("features",)  # of what the rest of a composition sees

    def excludes(self, other: Method) -> str | None:
        if isinstance(other, Fitted) and other.about in self.changes:
            return f"changes the {other.about} of the model that the other was fitted to"
        return None

    def maps(self, layouts: Sequence[LayerLayout], tensors: Mapping[str, torch.Tensor]) -> list[Maps]:
        """The maps of each layer, of what was found."""
        raise NotImplementedError

    def refusal(self, layout: LayerLayout) -> str | None:
        return "what latent attention keeps has few features already" if layout.shared else None
