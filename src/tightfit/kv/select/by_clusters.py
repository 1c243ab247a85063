"""Tokens by the centroids of the clusters that they are in."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import lists, ops
from tightfit.kernels.attention import Scoring
from tightfit.kernels.ops import op
from tightfit.kernels.pages import Looking, Rows
from tightfit.kv.cache import as_bytes, place
from tightfit.kv.reserved import numbers
from tightfit.kv.select.clustering import Clustering
from tightfit.kv.select.clusters import READ_AT_ONCE, Keys, cluster
from tightfit.kv.select.selecting import Selecting, Settled, Where


class ByClusters(Selecting):
    """Of each head, ``clusters`` clusters with their ``centroids`` and ``sizes``, and of each token before ``since``
    the cluster that it is in, -1 for those that are always read."""

    def __init__(self, where: Where, method: Clustering) -> None:
        self.pages, self.method, self.most = where.pages, method, where.most
        layout, sequences, arena = where.layout, where.sequences, where.arena
        self.room = 2 * (where.most // method.size) + 8
        self.clusters = numbers(arena, sequences, layout.kv_heads)
        self.since = numbers(arena, sequences, layout.kv_heads)
        self.assigned = numbers(arena, sequences, layout.kv_heads, where.most)
        self.sizes = numbers(arena, sequences, layout.kv_heads, self.room)
        self.centroids = place(arena, (sequences, layout.kv_heads, self.room, layout.key_dim), torch.float32)

    def look(self, rows: Rows, looking: Looking, ws: Workspace, scoring: Scoring) -> Looking:
        n, kv_heads = looking.q.shape[0], self.since.shape[1]
        listed = ws.empty(n, kv_heads, self.method.tokens, dtype=torch.int32)
        since = ws.empty(n, kv_heads, dtype=torch.int32)
        with ws.frame():
            scratch = ws.empty(2, self.room), ws.empty(2, self.room, dtype=torch.int32)
            _choose(self, rows, looking.q, listed, since, *scratch, scoring.scale)
        return looking._replace(listed=listed, since=since)

    def among(self, slot: int) -> list[int]:
        return self.since[slot].tolist()

    def index_bytes(self, slot: int) -> int:
        return int(self.clusters[slot].sum()) * self.centroids.shape[3] * 4 + int(self.since[slot].sum()) * 4

    def settled(self, slot: int, now: Settled, ws: Workspace) -> None:
        kv_heads = self.since.shape[1]
        if ops.is_dry():
            keys = Keys(self.pages, slot, 0, 0, min(self.most, READ_AT_ONCE), ws)
            count = min(self.room, max(self.most // self.method.size, 1))
            cluster(keys, self.centroids[slot, 0, :count], self.assigned[slot, 0], 1, ws)
            return
        if now.indices is not None and now.counts is not None:
            for head in range(kv_heads):
                self._move(slot, head, now.indices[head, : now.counts[head]].long())
        for head, tokens in enumerate(self.pages.lengths[slot].tolist()):
            self._cluster(slot, head, tokens, now, ws)

    def _move(self, slot: int, head: int, kept: torch.Tensor) -> None:
        """Only the tokens at places ``kept`` stay, in that order."""
        before = int(self.since[slot, head])
        kept = kept[kept < before]
        assigned = self.assigned[slot, head]
        assigned[: len(kept)] = assigned[kept]
        self.since[slot, head] = len(kept)
        self._count(slot, head)

    def _cluster(self, slot: int, head: int, tokens: int, now: Settled, ws: Workspace) -> None:
        start, used = int(self.since[slot, head]), int(self.clusters[slot, head])
        stop = self.method.due(start, tokens, now)
        if stop <= start:
            return
        count = max((stop - start) // self.method.size, 1)
        if used + count > self.room:  # where tokens left, too few are in a cluster: all are clustered anew
            start, used, count = 0, 0, max(stop // self.method.size, 1)
        first = max(start, min(self.method.always(start), stop))
        assigned = self.assigned[slot, head]
        assigned[start:first] = -1
        count = min(count, stop - first)
        keys = Keys(self.pages, slot, head, first, stop, ws)
        if count:
            centroids = self.centroids[slot, head, used : used + count]
            cluster(keys, centroids, assigned[first:stop], self.method.iterations, ws)
            assigned[first:stop] += used
        self.clusters[slot, head], self.since[slot, head] = used + count, stop
        self._count(slot, head)

    def _count(self, slot: int, head: int) -> None:
        assigned = self.assigned[slot, head, : self.since[slot, head]]
        self.sizes[slot, head] = torch.bincount(assigned + 1, minlength=self.room + 1)[1:]

    def reset(self, slot: int) -> None:
        self.clusters[slot] = self.since[slot] = 0

    def parts(self, slot: int) -> Iterator[torch.Tensor]:
        yield as_bytes(self.clusters[slot])
        yield as_bytes(self.since[slot])
        both = zip(self.clusters[slot].tolist(), self.since[slot].tolist(), strict=True)
        for head, (clusters, since) in enumerate(both):
            yield as_bytes(self.centroids[slot, head, :clusters])
            yield as_bytes(self.sizes[slot, head])
            yield as_bytes(self.assigned[slot, head, :since])


@op
def _choose(
    state: ByClusters,
    rows: Rows,
    q: torch.Tensor,
    listed_: torch.Tensor,
    since_: torch.Tensor,
    scores_: torch.Tensor,
    order_: torch.Tensor,
    scale: float,
) -> None:
    """Lists (n, kv_heads, m) and ``since`` (n, kv_heads) of rows with queries ``q`` (n, heads, key_dim)."""
    kv_heads, share = listed_.shape[1], state.method.share()
    groups = q.shape[1] // kv_heads
    for row, slot in enumerate(rows.places[: len(q), 0].tolist()):
        since_[row] = state.since[slot]
        for head, (clusters, since) in enumerate(zip(state.clusters[slot].tolist(), since_[row].tolist(), strict=True)):
            scores, assigned = scores_[0, :clusters], state.assigned[slot, head, :since]
            centroids, sizes, least = state.centroids[slot, head, :clusters], None, lists.EVERY
            if share is not None:
                sizes = state.sizes[slot, head, :clusters]
                least = share / max(int(sizes.sum()), 1)
            queries = q[row, head * groups : (head + 1) * groups]
            lists.score_centroids(centroids, queries, scores, scores_[1], sizes, scale)
            lists.list_best(scores, listed_[row, head], order_, assigned, least)
