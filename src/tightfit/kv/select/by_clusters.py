"""Tokens by the centroids of the clusters that they are in."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import ops
from tightfit.kv.cache import as_bytes, place
from tightfit.kv.select.clustering import Clustering
from tightfit.kv.select.clusters import READ_AT_ONCE, Keys, cluster
from tightfit.kv.select.grouped import Grouped
from tightfit.kv.select.selecting import Settled, Where


class ByClusters(Grouped):
    """Groups are clusters of each sequence's own keys, and ``centroids`` their means."""

    def __init__(self, where: Where, method: Clustering) -> None:
        super().__init__(where, method, 2 * (where.most // method.size) + 8)
        self.method = method
        shape = where.sequences, where.layout.kv_heads, self.room, where.layout.key_dim
        self.centroids = place(where.arena, shape, torch.float32)

    def index_bytes(self, slot: int) -> int:
        return 4 * (int(self.groups[slot].sum()) * self.centroids.shape[3] + int(self.since[slot].sum()))

    def settled(self, slot: int, now: Settled, ws: Workspace) -> None:
        if ops.is_dry():
            keys = Keys(self.pages, slot, 0, 0, min(self.most, READ_AT_ONCE), ws)
            count = min(self.room, max(self.most // self.method.size, 1))
            cluster(keys, self.centroids[slot, 0, :count], self.assigned[slot, 0], 1, ws)
            return
        for head, tokens in enumerate(self.pages.lengths[slot].tolist()):
            since = int(self.since[slot, head])
            if now.indices is not None and now.counts is not None:
                self.count(slot, head, self.move(slot, head, now.indices[head, : now.counts[head]], since))
            self._cluster(slot, head, tokens, now, ws)

    def _cluster(self, slot: int, head: int, tokens: int, now: Settled, ws: Workspace) -> None:
        start, used = int(self.since[slot, head]), int(self.groups[slot, head])
        stop = self.method.due(start, tokens, now)
        if stop <= start:
            return
        count = max((stop - start) // self.method.size, 1)
        if used + count > self.room:  # where tokens left, too few are in a cluster: all are clustered anew
            start, used, count = 0, 0, max(stop // self.method.size, 1)
        first = max(start, min(self.method.always, stop))
        assigned = self.assigned[slot, head]
        assigned[start:first] = -1
        count = min(count, stop - first)
        if count:
            centroids = self.centroids[slot, head, used : used + count]
            keys = Keys(self.pages, slot, head, first, stop, ws)
            cluster(keys, centroids, assigned[first:stop], self.method.iterations, ws)
            assigned[first:stop] += used
        self.groups[slot, head] = used + count
        self.count(slot, head, stop)

    def parts(self, slot: int) -> Iterator[torch.Tensor]:
        yield as_bytes(self.groups[slot])
        yield as_bytes(self.since[slot])
        for head, (groups, since) in enumerate(zip(self.groups[slot].tolist(), self.since[slot].tolist(), strict=True)):
            yield as_bytes(self.centroids[slot, head, :groups])
            yield as_bytes(self.sizes[slot, head])
            yield as_bytes(self.assigned[slot, head, :since])
