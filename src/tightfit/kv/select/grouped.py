"""Tokens by the scores of the groups that they are in."""

from __future__ import annotations

from typing import Protocol

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import lists
from tightfit.kernels.attention import Scoring
from tightfit.kernels.ops import op
from tightfit.kernels.pages import Looking, Rows
from tightfit.kv.cache import numbers
from tightfit.kv.select.selecting import Selecting, Where, room_for_lists


class Grouping(Protocol):
    """A method of groups."""

    @property
    def tokens(self) -> int: ...

    def share(self) -> float | None:
        """What a key of a group that is read must be given, as a multiple of an even share of a softmax over all
        grouped keys; None: groups are ranked by their products alone."""


class Grouped(Selecting):
    """Of each head, ``groups`` groups, with ``sizes`` tokens, and ``centroids`` (sequences, kv_heads, room, key_dim)
    that stand for their keys; and of each token before ``since`` the group that it is in, -1 for those that are always
    read."""

    centroids: torch.Tensor

    def __init__(self, where: Where, method: Grouping, room: int) -> None:
        self.pages, self.grouping, self.most, self.room = where.pages, method, where.most, room
        shape, arena = (where.sequences, where.layout.kv_heads), where.arena
        self.groups, self.since = numbers(arena, *shape), numbers(arena, *shape)
        self.sizes = numbers(arena, *shape, room)
        self.assigned = numbers(arena, *shape, where.most)

    def look(self, rows: Rows, looking: Looking, ws: Workspace, scoring: Scoring) -> Looking:
        listed, since = room_for_lists(len(looking.q), self.since.shape[1], self.grouping.tokens, ws)
        with ws.frame():
            scratch = ws.empty(2, self.room), ws.empty(2, self.room, dtype=torch.int32)
            _choose(self, rows, self.asked(rows, looking.q, ws), listed, since, *scratch, scoring.scale)
        return looking._replace(listed=listed, since=since)

    def asked(self, rows: Rows, q: torch.Tensor, ws: Workspace) -> torch.Tensor:
        """The queries that centroids are scored with."""
        return q

    def among(self, slot: int) -> list[int]:
        return self.since[slot].tolist()

    def move(self, slot: int, head: int, kept: torch.Tensor, before: int) -> int:
        """Of the first ``before`` tokens only those at places ``kept`` (n,) stay; gives how many."""
        kept = kept[kept < before].long()
        assigned = self.assigned[slot, head]
        assigned[: len(kept)] = assigned[kept]
        return len(kept)

    def count(self, slot: int, head: int, since: int) -> None:
        """Tokens before ``since`` are chosen among."""
        self.since[slot, head] = since
        self.sizes[slot, head] = torch.bincount(self.assigned[slot, head, :since] + 1, minlength=self.room + 1)[1:]

    def reset(self, slot: int) -> None:
        self.groups[slot] = self.since[slot] = 0


@op
def _choose(
    state: Grouped,
    rows: Rows,
    q: torch.Tensor,
    listed_: torch.Tensor,
    since_: torch.Tensor,
    scores_: torch.Tensor,
    order_: torch.Tensor,
    scale: float,
) -> None:
    """Lists (n, kv_heads, m) and ``since`` (n, kv_heads) of rows with queries ``q`` (n, heads, key_dim)."""
    kv_heads, share = listed_.shape[1], state.grouping.share()
    heads = q.shape[1] // kv_heads
    for row, slot in enumerate(rows.places[: len(q), 0].tolist()):
        since_[row] = state.since[slot]
        for head, (groups, since) in enumerate(zip(state.groups[slot].tolist(), since_[row].tolist(), strict=True)):
            scores, least, sizes = scores_[0, :groups], lists.EVERY, state.sizes[slot, head, :groups]
            grouped = int(sizes.sum())
            if share is not None:
                least = share / max(grouped, 1)
            if grouped:
                centroids, queries = state.centroids[slot, head, :groups], q[row, head * heads : (head + 1) * heads]
                of_sizes = None if share is None else sizes
                lists.score_centroids(centroids, queries, scores, scores_[1], of_sizes, scale)
            else:  # all tokens so far are read
                scores = scores[:0]
            lists.list_best(scores, listed_[row, head], order_, state.assigned[slot, head, :since], least)
