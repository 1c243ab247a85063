"""Clusters of the keys of a context that is fixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.select.clustering import Clustering

if TYPE_CHECKING:
    from tightfit.kv.select.selecting import Settled

QUESTION = 100  # last tokens of a prompt that are not its fixed context


@technique(
    seam="kv",
    name="squeezed",
    paper="https://arxiv.org/abs/2411.09688",
    exact=False,
    summary="the keys of a fixed context are clustered once, and of it only clusters that matter are read",
)
@dataclass(frozen=True)
class Squeezed(Clustering):
    """The first ``prefix`` tokens of a prompt are the fixed context (0: all of the first prompt but its last 100
    tokens): their keys are clustered once, by k-means on their cosines with ``size`` tokens to a cluster, and clusters
    are kept with what a prompt cache keeps of the prompt. Of them a token that decodes reads those in which a key would
    be given at least ``least`` times an even share of a query's attention, if keys were their centroids; the highest
    first, up to ``tokens`` tokens. All that comes later is read.

    The paper clusters before any question comes, and chooses for the tokens of the question too, with a threshold for
    all heads that fits a wanted sparsity; here prompts see everything, and each head reads at most ``tokens``. Its
    second level of centroids is left out.

    The embedded model answers as many look-ups as with all of 2000 tokens when it reads a third of them, where snapkv
    with as many answers a quarter; the divergence is 0.001 nats.
    """

    prefix: int = 0
    least: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix < 0 or self.least < 0:
            raise UsageError(
                f"squeezed cannot cluster {self.prefix} tokens, and read those with {self.least:g} times an even share",
                "Give prefix=0 and least=0 or more.",
            )

    def due(self, clustered: int, tokens: int, now: Settled) -> int:
        if clustered or not now.count:
            return clustered
        if self.prefix:
            return self.prefix if tokens >= self.prefix else 0
        return max(tokens - QUESTION, 0) if now.whole else 0

    def share(self) -> float:
        return self.least
