"""What methods that cluster keys have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.errors import UsageError
from tightfit.kv.method import Selector

if TYPE_CHECKING:
    from tightfit.kv.select.selecting import Selecting, Settled, Where


@dataclass(frozen=True)
class Clustering(Selector):
    """Keys are clustered by their cosines, ``size`` tokens to a cluster on average, in so many ``iterations``."""

    size: int = 20
    iterations: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.size, self.iterations) < 1:
            raise UsageError(
                f"{self.name} cannot make clusters of {self.size} tokens in {self.iterations} iterations",
                "Give size=1 and iterations=1 or more.",
            )

    def due(self, clustered: int, tokens: int, now: Settled) -> int:
        """Up to which of a head's ``tokens`` those behind the ``clustered`` ones are clustered now."""
        raise NotImplementedError

    @property
    def always(self) -> int:
        """How many of the first tokens are in no cluster, and always read."""
        return 0

    def share(self) -> float | None:
        """What a key of a cluster that is read must be given, as a multiple of an even share of a softmax over all
        clustered keys; None: clusters are ranked by their products alone."""
        return None

    def select(self, where: Where) -> Selecting:
        from tightfit.kv.select.by_clusters import ByClusters

        return ByClusters(where, self)
