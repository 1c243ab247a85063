"""The tokens that the last queries together gave most to, and a window."""

from __future__ import annotations

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels.attention import Scoring
from tightfit.kv.select.by_attention import ByAttention, Scratch
from tightfit.kv.select.selecting import Settled, Where


class ByLastQueries(ByAttention):
    """``queries`` are a ring of those of the last steps. After each token it is also known how many were ``seen``, and
    whether what is listed is ``stale``: tokens became certain since."""

    def __init__(self, where: Where, count: int, recent: int, steps: int) -> None:
        super().__init__(where, count, recent, remembered=steps)
        self.seen = self.states.add(dtype=torch.int32)
        self.stale = self.states.add(dtype=torch.int32)

    def choose(
        self,
        states: tuple[int, int, int],
        q: torch.Tensor,
        listed_: torch.Tensor,
        since_: torch.Tensor,
        scratch: Scratch,
        scoring: Scoring,
    ) -> None:
        slot, before, after = states
        for known in (self.listed, self.queries):
            known[slot, after] = known[slot, before]
        seen = int(self.seen[slot, before])
        queries = self.queries[slot, after]
        queries[seen % self.remembered] = q
        if self.stale[slot, before]:
            self.list_most(slot, queries[: seen + 1], self.listed[slot, after], scratch, scoring)
        self.seen[slot, after], self.stale[slot, after] = seen + 1, 0
        listed_.copy_(self.listed[slot, after])
        since_.copy_(self.since[slot])

    def settled(self, slot: int, now: Settled, ws: Workspace) -> None:
        super().settled(slot, now, ws)
        self.stale[slot] = 1

    def reset(self, slot: int) -> None:
        super().reset(slot)
        self.seen[slot] = 0
        self.stale[slot] = 1
