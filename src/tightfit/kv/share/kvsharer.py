"""Layers that read what another one keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.method import Method

if TYPE_CHECKING:
    from tightfit.kv.base import LayerLayout


@technique(
    seam="kv",
    name="kvsharer",
    paper="https://arxiv.org/abs/2410.18517",
    exact=False,
    summary="a share of the layers reads the keys and values of earlier, unlike ones, found once with a text",
    calibration="a text (`tightfit fit`)",
)
@dataclass(frozen=True)
class KVSharer(Method):
    """A share ``share`` of the layers, rounded to whole ones, computes and keeps no keys and values of its own, and
    reads those of an earlier layer.

    Which ones is found by `tightfit fit` (:mod:`tightfit.engine.fit`): pairs of layers from the most to the least
    dissimilar, each kept if the final hidden states stay closer to the original ones than ``threshold``, a cosine.
    Only layers with the same shapes, rotation and window can share. What methods judge tokens by is summed over the
    layers that read them; think chooses channels by the queries of the layer that computes them.
    """

    share: float = 0.25
    threshold: float = 0.5

    roles: ClassVar[tuple[str, ...]] = ("layers",)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or not -1 <= self.threshold <= 1:
            raise UsageError(
                f"kvsharer cannot let a share of {self.share:g} of the layers share, above a cosine of "
                f"{self.threshold:g}",
                "Give a share between 0 and 1, and a threshold from -1 to 1.",
            )

    def wanted(self, layers: int) -> int:
        """How many of the layers share."""
        return min(round(self.share * layers), layers - 1)

    def refusal(self, layout: LayerLayout) -> str | None:
        return "each layer of latent attention makes other keys of its latents" if layout.shared else None
