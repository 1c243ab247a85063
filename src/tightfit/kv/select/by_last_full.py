"""The tokens that the last full step gave most to."""

from __future__ import annotations

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels.attention import Scoring
from tightfit.kv.select.by_attention import ByAttention, Scratch
from tightfit.kv.select.selecting import Settled, Where
from tightfit.kv.select.tentative import NEVER


class ByLastFull(ByAttention):
    """``queries`` are those of the last full step. After each token it is also known how many steps ago that was, its
    ``age``, and from where on what came after it is ``unlisted`` and seen whole.

    Where tokens were let go of, or more of a prompt came, lists hold no longer, and the next step is a full one.
    """

    def __init__(self, where: Where, count: int, stride: int, similar: float) -> None:
        super().__init__(where, count, recent=0, remembered=1)
        self.stride, self.similar = stride, similar
        self.unlisted = self.states.add(where.layout.kv_heads, dtype=torch.int32)
        self.age = self.states.add(dtype=torch.int32)

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
        age = int(self.age[slot, before]) + 1
        if age < self.stride and not self._differs(q, self.queries[slot, before, 0]):
            for known in (self.listed, self.unlisted, self.queries):
                known[slot, after] = known[slot, before]
            self.age[slot, after] = age
            listed_.copy_(self.listed[slot, after])
            since_.copy_(self.unlisted[slot, after])
            return
        self.list_most(slot, q[None], self.listed[slot, after], scratch, scoring)
        self.unlisted[slot, after] = self.since[slot]
        self.queries[slot, after, 0] = q
        self.age[slot, after] = 0
        listed_.fill_(-1)
        since_.zero_()

    def _differs(self, q: torch.Tensor, last: torch.Tensor) -> bool:
        return self.similar > -1 and bool(torch.cosine_similarity(q, last, dim=1).mean() < self.similar)

    def settled(self, slot: int, now: Settled, ws: Workspace) -> None:
        super().settled(slot, now, ws)
        if now.count or now.indices is not None:
            self.age[slot] = NEVER

    def reset(self, slot: int) -> None:
        super().reset(slot)
        self.age[slot] = NEVER
