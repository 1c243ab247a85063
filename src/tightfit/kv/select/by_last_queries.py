"""The tokens that the last queries together gave most to, and a window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import lists, pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.ops import op
from tightfit.kernels.pages import Looking, Rows
from tightfit.kv.cache import as_bytes, numbers
from tightfit.kv.select.selecting import Selecting, Settled, Where
from tightfit.kv.select.tentative import Tentative


class ByLastQueries(Selecting):
    """``count`` tokens of each head before the last ``recent`` ones. After each token its last queries are known, how
    many there were, what was chosen, and whether it must be chosen anew: tokens were settled."""

    def __init__(self, where: Where, count: int, recent: int, steps: int) -> None:
        self.pages, self.most, self.count, self.recent, self.steps = where.pages, where.most, count, recent, steps
        layout, arena = where.layout, where.arena
        self.since = numbers(arena, where.sequences, layout.kv_heads)
        self.states = Tentative(where.sequences, where.tail, arena)
        self.listed = self.states.add(layout.kv_heads, count, dtype=torch.int32)
        self.queries = self.states.add(steps, layout.heads, layout.key_dim, dtype=torch.float32)
        self.seen = self.states.add(dtype=torch.int32)
        self.stale = self.states.add(dtype=torch.int32)

    def look(self, rows: Rows, looking: Looking, ws: Workspace, scoring: Scoring) -> Looking:
        n, kv_heads = looking.q.shape[0], self.since.shape[1]
        listed = ws.empty(n, kv_heads, self.count, dtype=torch.int32)
        since = ws.empty(n, kv_heads, dtype=torch.int32)
        with ws.frame():
            shares, order = ws.empty(2, kv_heads, self.most), ws.empty(2, self.most, dtype=torch.int32)
            scratch = pages.shares_scratch(self.pages, looking.q.shape[1], ws)
            _sum_up(self, rows, looking.q, listed, since, shares, order, scratch, scoring)
        return looking._replace(listed=listed, since=since)

    def among(self, slot: int) -> list[int]:
        return self.since[slot].tolist()

    def settled(self, slot: int, now: Settled, ws: Workspace) -> None:
        torch.sub(self.pages.lengths[slot], self.recent, out=self.since[slot]).clamp_(min=0)
        self.stale[slot] = 1

    def commit(self, slot: int, path: Sequence[int]) -> None:
        self.states.commit(slot, path)

    def reset(self, slot: int) -> None:
        self.since[slot] = 0
        self.seen[slot] = 0
        self.stale[slot] = 1

    def parts(self, slot: int) -> Iterator[torch.Tensor]:
        yield as_bytes(self.since[slot])
        yield from self.states.parts(slot)


@op
def _sum_up(
    state: ByLastQueries,
    rows: Rows,
    q: torch.Tensor,
    listed_: torch.Tensor,
    since_: torch.Tensor,
    shares_: torch.Tensor,
    order_: torch.Tensor,
    scratch_: torch.Tensor,
    scoring: Scoring,
) -> None:
    """Lists (n, kv_heads, m) and ``since`` (n, kv_heads) of rows with queries ``q`` (n, heads, key_dim)."""
    for row, slot, before, after in state.states.steps(rows, state.pages.tokens, len(q)):
        since, queries = state.since[slot], state.queries[slot, after]
        seen, stale = int(state.seen[slot, before]), int(state.stale[slot, before])
        queries.copy_(state.queries[slot, before])
        queries[seen % state.steps] = q[row]
        listed = state.listed[slot, after]
        listed.copy_(state.listed[slot, before])
        if stale:
            total, one = shares_
            total.zero_()
            for query in queries[: seen + 1]:
                pages.shares(state.pages, slot, query, since, one, scratch_, scoring)
                for head, count in enumerate(since.tolist()):
                    total[head, :count] += one[head, :count]
            for head, count in enumerate(since.tolist()):
                lists.list_best(total[head, :count], listed[head], order_)
        state.seen[slot, after], state.stale[slot, after] = seen + 1, 0
        listed_[row], since_[row] = listed, since
