"""The experts that were used last stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.catalog import technique
from tightfit.experts.policy import Policy, Ranking

if TYPE_CHECKING:
    import torch

    from tightfit.experts.census import Census


class _Recency(Ranking):
    clock = 0

    def used(self, layer: int, experts: list[int], scores: torch.Tensor) -> None:
        self.clock += 1
        self.worth[layer, experts] = float(self.clock)


@technique(
    seam="experts",
    name="lru",
    paper="https://arxiv.org/abs/2312.17238",
    exact=True,
    summary="keeps the experts that were used last",
)
@dataclass(frozen=True)
class Lru(Policy):
    """Least recently used goes first, as in "Fast Inference of Mixture-of-Experts Language Models with Offloading".

    It departs from that in that the layers share the slots: which layer has how many follows from their use.
    """

    def ranking(self, layers: int, experts: int, per_token: int, census: Census | None) -> Ranking:
        return _Recency(layers, experts)
