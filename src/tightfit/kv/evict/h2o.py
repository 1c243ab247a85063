"""Heavy hitters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.method import Evictor, Seen

if TYPE_CHECKING:
    import torch


@technique(
    seam="kv",
    name="h2o",
    paper="https://arxiv.org/abs/2306.14048",
    exact=False,
    summary="recent tokens, and of the rest those that received most attention while they were cached",
)
@dataclass(frozen=True)
class H2O(Evictor):
    """Heavy-Hitter Oracle: a share ``recent`` of what is kept are the last tokens, the rest those with most attention,
    summed over all queries since they came.

    ``normalize`` divides by how many queries could see a token. Heads that share keys and values sum up what they give,
    since a token can only be kept for all of them (the paper has a key for each head). The paper lets go of one token
    for each that comes; here that happens in blocks.
    """

    recent: float = 0.5
    normalize: bool = False

    observes: ClassVar[str] = "all"

    def __post_init__(self) -> None:
        if not 0 <= self.recent <= 1:
            raise UsageError(f"h2o cannot keep a share of {self.recent:g} recent tokens", "Give recent=0 to recent=1.")
        super().__post_init__()

    def protected(self, keep: int) -> tuple[int, int]:
        return 0, int(self.recent * keep)

    def scores(self, seen: Seen) -> torch.Tensor:
        return seen.mass / (seen.tokens - seen.positions) if self.normalize else seen.mass
