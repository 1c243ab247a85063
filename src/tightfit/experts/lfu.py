"""The experts that were used most often stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.catalog import technique
from tightfit.experts.policy import Policy, Ranking

if TYPE_CHECKING:
    import torch

    from tightfit.experts.census import Census

TIE = 1e-9  # of two experts that were used equally often, the one that was used last is worth more


class _Frequency(Ranking):
    clock = 0

    def used(self, layer: int, experts: list[int], scores: torch.Tensor) -> None:
        self.clock += 1
        count = self.worth[layer, experts].floor() + 1
        self.worth[layer, experts] = count + min(TIE * self.clock, 0.5)


@technique(
    seam="experts",
    name="lfu",
    paper="https://arxiv.org/abs/2308.14352",
    exact=True,
    summary="keeps the experts that were used most often",
)
@dataclass(frozen=True)
class Lfu(Policy):
    """Least frequently used goes first. After EdgeMoE, whose cache weighs how often an expert was used; it departs from
    it in that what an expert costs to read does not count, since all of a layer are equally large, nor how soon its
    layer's turn comes."""

    def ranking(self, layers: int, experts: int, per_token: int, census: Census | None) -> Ranking:
        return _Frequency(layers, experts)
