"""The experts that a text was seen to activate most stay, from the first token on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.experts.policy import Policy, Ranking

if TYPE_CHECKING:
    import torch

    from tightfit.experts.census import Census


class _Counted(Ranking):
    def first(self, slots: int) -> list[tuple[int, int]]:
        count = self.worth.shape[1]
        best = self.worth.flatten().argsort(descending=True, stable=True)[:slots].tolist()
        return [divmod(index, count) for index in best]

    def used(self, layer: int, experts: list[int], scores: torch.Tensor) -> None:
        pass  # what a text activated is all that counts


@technique(
    seam="experts",
    name="static",
    paper="https://arxiv.org/abs/2303.06182",
    exact=True,
    summary="keeps the experts that a text activated most (`tightfit census`), from the first token on",
    calibration="a text (`tightfit census`)",
)
@dataclass(frozen=True)
class Static(Policy):
    """The experts that a census counted most often are read at the start and stay; all others pass through the slots
    that the least of them give up.

    After "Towards MoE Deployment", which places experts by how often they were activated before. It departs from it in
    that the slots are shared by all layers.
    """

    needs_census: ClassVar[bool] = True

    def ranking(self, layers: int, experts: int, per_token: int, census: Census | None) -> Ranking:
        assert census is not None
        ranking = _Counted(layers, experts)
        ranking.worth += ranking.worth.new_tensor(census.shares)
        return ranking
