"""Tokens to which the queries of earlier steps gave most."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import lists, pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.ops import op
from tightfit.kernels.pages import Looking, Rows
from tightfit.kv.cache import as_bytes, numbers
from tightfit.kv.select.selecting import Selecting, Settled, Where, room_for_lists
from tightfit.kv.select.tentative import Tentative


class Scratch(NamedTuple):
    """For :meth:`ByAttention.list_most`: what one query gives and the sum, (1 or 2, kv_heads, most), the order of
    tokens (2, most) int32, and what the kernel takes."""

    shares: torch.Tensor
    order: torch.Tensor
    kernel: torch.Tensor


class ByAttention(Selecting):
    """``count`` tokens of each head are chosen among those before the last ``recent`` ones, as they were when tokens
    last became certain, so that drafts choose as single tokens do: those before ``since`` (sequences, kv_heads). After
    each token it is known what is ``listed`` then, and which ``queries`` came last, of ``remembered`` tokens."""

    def __init__(self, where: Where, count: int, recent: int, remembered: int) -> None:
        self.pages, self.most = where.pages, where.most
        self.count, self.recent, self.remembered = count, recent, remembered
        layout, arena = where.layout, where.arena
        self.since = numbers(arena, where.sequences, layout.kv_heads)
        self.states = Tentative(where.sequences, where.tail, arena)
        self.listed = self.states.add(layout.kv_heads, count, dtype=torch.int32)
        self.queries = self.states.add(remembered, layout.heads, layout.key_dim, dtype=torch.float32)

    @abstractmethod
    def choose(
        self,
        states: tuple[int, int, int],
        q: torch.Tensor,
        listed_: torch.Tensor,
        since_: torch.Tensor,
        scratch: Scratch,
        scoring: Scoring,
    ) -> None:
        """What a token with queries ``q`` (heads, key_dim) sees, ``listed`` (kv_heads, count) and all from ``since``
        (kv_heads,) on, and what is known after it. ``states`` are its sequence, and the numbers of the states before
        and after it. Part of an operation."""

    def look(self, rows: Rows, looking: Looking, ws: Workspace, scoring: Scoring) -> Looking:
        (n, heads, _), kv_heads = looking.q.shape, self.since.shape[1]
        listed, since = room_for_lists(n, kv_heads, self.count, ws)
        with ws.frame():
            shares = ws.empty(min(self.remembered, 2), kv_heads, self.most)
            order = ws.empty(2, self.most, dtype=torch.int32)
            scratch = Scratch(shares, order, pages.shares_scratch(self.pages, heads, ws))
            _choose(self, rows, looking.q, listed, since, scratch, scoring)
        return looking._replace(listed=listed, since=since)

    def list_most(
        self, slot: int, queries: torch.Tensor, listed_: torch.Tensor, scratch: Scratch, scoring: Scoring
    ) -> None:
        """Lists (kv_heads, count) the tokens before ``since`` to which ``queries`` (n, heads, key_dim) would give most,
        all together, if there were no others. Part of an operation."""
        since = self.since[slot]
        counts = since.tolist()
        total, one = scratch.shares[0, :, : max(counts)], scratch.shares[-1, :, : max(counts)]
        for index, query in enumerate(queries):
            pages.shares(self.pages, slot, query, since, one if index else total, scratch.kernel, scoring)
            if index:
                total += one
        for head, count in enumerate(counts):
            lists.list_best(total[head, :count], listed_[head], scratch.order)

    def among(self, slot: int) -> list[int]:
        return self.since[slot].tolist()

    def settled(self, slot: int, now: Settled, ws: Workspace) -> None:
        torch.sub(self.pages.lengths[slot], self.recent, out=self.since[slot]).clamp_(min=0)

    def commit(self, slot: int, path: Sequence[int]) -> None:
        self.states.commit(slot, path)

    def reset(self, slot: int) -> None:
        self.since[slot] = 0

    def parts(self, slot: int) -> Iterator[torch.Tensor]:
        yield as_bytes(self.since[slot])
        yield from self.states.parts(slot)


@op
def _choose(
    state: ByAttention,
    rows: Rows,
    q: torch.Tensor,
    listed_: torch.Tensor,
    since_: torch.Tensor,
    scratch_: Scratch,
    scoring: Scoring,
) -> None:
    """Lists (n, kv_heads, count) and ``since`` (n, kv_heads) of rows with queries ``q`` (n, heads, key_dim): one after
    the other, as what is known after a draft is what the next one on its path begins with."""
    for row, *states in state.states.steps(rows, state.pages.tokens, len(q)):
        slot, before, after = states
        state.choose((slot, before, after), q[row], listed_[row], since_[row], scratch_, scoring)
