"""The experts that routers scored highest of late stay, whether they were used or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.experts.policy import Policy, Ranking

if TYPE_CHECKING:
    import torch

    from tightfit.experts.census import Census


class _RecentScores(Ranking):
    def __init__(self, layers: int, experts: int, per_token: int, settings: Score) -> None:
        super().__init__(layers, experts)
        self.count, self.alpha = min(settings.top * per_token, experts), settings.alpha

    def used(self, layer: int, experts: list[int], scores: torch.Tensor) -> None:
        best = scores.topk(self.count, dim=-1)
        kept = scores.new_zeros(scores.shape).scatter_(-1, best.indices, best.values).mean(0)
        self.worth[layer].mul_(1 - self.alpha).add_(kept, alpha=self.alpha)


@technique(
    seam="experts",
    name="score",
    paper="https://arxiv.org/abs/2504.05897",
    exact=True,
    summary="keeps the experts that routers scored highest of late",
)
@dataclass(frozen=True)
class Score(Policy):
    """HybriMoE's cache policy: an expert that was nearly chosen is more likely to be chosen next than any other.

    What an expert is worth is ``alpha`` times its score of this step, if that is among the ``top`` times as many best
    ones as a token chooses, plus 1 - ``alpha`` times what it was worth before. It departs from HybriMoE in that a step
    of several tokens counts their mean, and in that the layers share the slots.
    """

    alpha: float = 0.2
    top: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise UsageError(f"score cannot weigh a step with {self.alpha}", "alpha is above 0 and at most 1.")
        if self.top < 1:
            raise UsageError(f"score cannot keep {self.top} times the best", "top is 1 or more.")

    def ranking(self, layers: int, experts: int, per_token: int, census: Census | None) -> Ranking:
        return _RecentScores(layers, experts, per_token, self)
