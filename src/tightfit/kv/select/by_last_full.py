"""The tokens that the last full step gave most to."""

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

NEVER = 1 << 30


class ByLastFull(Selecting):
    """``count`` tokens of each head. After each token it is known what the last full step gave most to, from which
    token on everything is seen, the queries of that step, and how many steps ago it was.

    Tokens are chosen among those that were certain when the sequence last had a multiple of 32 tokens, so that drafts
    choose as single tokens do. Where tokens were let go of, lists hold no longer, and the next step is a full one.
    """

    def __init__(self, where: Where, count: int, stride: int, similar: float) -> None:
        self.pages, self.count, self.stride, self.similar = where.pages, count, stride, similar
        self.most = where.most
        layout, arena = where.layout, where.arena
        self.certain = numbers(arena, where.sequences, layout.kv_heads)
        self.states = Tentative(where.sequences, where.tail, arena)
        self.listed = self.states.add(layout.kv_heads, count, dtype=torch.int32)
        self.since = self.states.add(layout.kv_heads, dtype=torch.int32)
        self.queries = self.states.add(layout.heads, layout.key_dim, dtype=torch.float32)
        self.age = self.states.add(dtype=torch.int32)

    def look(self, rows: Rows, looking: Looking, ws: Workspace, scoring: Scoring) -> Looking:
        n, kv_heads = looking.q.shape[0], self.certain.shape[1]
        listed = ws.empty(n, kv_heads, self.count, dtype=torch.int32)
        since = ws.empty(n, kv_heads, dtype=torch.int32)
        with ws.frame():
            shares, order = ws.empty(kv_heads, self.most), ws.empty(2, self.most, dtype=torch.int32)
            scratch = pages.shares_scratch(self.pages, looking.q.shape[1], ws)
            _recycle(self, rows, looking.q, listed, since, shares, order, scratch, scoring)
        return looking._replace(listed=listed, since=since)

    def among(self, slot: int) -> list[int]:
        return self.certain[slot].tolist()

    def settled(self, slot: int, now: Settled, ws: Workspace) -> None:
        self.certain[slot] = self.pages.lengths[slot]
        if now.count or now.indices is not None:
            self.age[slot] = NEVER

    def commit(self, slot: int, path: Sequence[int]) -> None:
        self.states.commit(slot, path)

    def reset(self, slot: int) -> None:
        self.certain[slot] = 0
        self.age[slot] = NEVER

    def parts(self, slot: int) -> Iterator[torch.Tensor]:
        yield as_bytes(self.certain[slot])
        yield from self.states.parts(slot)


@op
def _recycle(
    state: ByLastFull,
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
        age, last = int(state.age[slot, before]) + 1, state.queries[slot, before]
        full = age >= state.stride
        if not full and state.similar > -1:
            full = bool(torch.cosine_similarity(q[row], last, dim=1).mean() < state.similar)
        if full:
            certain = state.certain[slot]
            pages.shares(state.pages, slot, q[row], certain, shares_, scratch_, scoring)
            for head, count in enumerate(certain.tolist()):
                lists.list_best(shares_[head, :count], state.listed[slot, after, head], order_)
            state.since[slot, after], state.queries[slot, after], state.age[slot, after] = certain, q[row], 0
            listed_[row], since_[row] = -1, 0
            continue
        for tensor in (state.listed, state.since, state.queries):
            tensor[slot, after] = tensor[slot, before]
        state.age[slot, after] = age
        listed_[row], since_[row] = state.listed[slot, before], state.since[slot, before]
