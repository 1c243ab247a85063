"""Clusters of alike keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.select.clustering import Clustering

if TYPE_CHECKING:
    from tightfit.kv.select.selecting import Settled


@technique(
    seam="kv",
    name="clusterkv",
    paper="https://arxiv.org/abs/2412.03213",
    exact=False,
    summary="keys are clustered, and decoding reads the clusters whose centroids score highest",
)
@dataclass(frozen=True)
class ClusterKV(Clustering):
    """Keys of a prompt are clustered by k-means on their cosines when all of it was read, ``size`` tokens to a cluster
    on average, and those of tokens that decode as soon as there are ``every`` more. A token that decodes reads the
    ``sinks`` first tokens, and the clusters whose centroids have the largest products with any query of a group, up to
    ``tokens`` tokens in all, so that the last cluster may be cut; and all that is not clustered yet.

    The paper has clusters of 80, and keeps those of the last steps on the device; here what lies in a file is read
    again, from the system's page cache as far as that has it.

    On the embedded model 256 of 2000 tokens in clusters of 10 diverge less than pages of quest (0.003 nats, 0.049), and
    answer 10 look-ups of 12 where quest answers 7, snapkv 2 and all tokens 11; clusters of 80 are too coarse there (2).
    """

    every: int = 320
    sinks: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1 or not 0 <= self.sinks < self.tokens:
            raise UsageError(
                f"clusterkv cannot make clusters every {self.every} tokens, and read {self.sinks} sinks among "
                f"{self.tokens} tokens",
                "Give every=1 or more, and fewer sinks than tokens.",
            )

    def due(self, clustered: int, tokens: int, now: Settled) -> int:
        prompt = now.count and now.whole
        return tokens if prompt or (now.whole and tokens - clustered >= self.every) else clustered

    @property
    def always(self) -> int:
        return self.sinks
