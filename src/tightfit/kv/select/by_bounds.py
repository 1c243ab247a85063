"""Pages by the largest score that their bounds allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.ops import op
from tightfit.kernels.pages import PAGE, Looking, Rows
from tightfit.kv.select.selecting import Selecting, Settled, Where
from tightfit.kv.select.tentative import NEVER, Tentative


class ByBounds(Selecting):
    """``count`` pages, of those that have bounds."""

    def __init__(self, where: Where, count: int) -> None:
        self.pages, self.count = where.pages, count

    def look(self, rows: Rows, looking: Looking, ws: Workspace, scoring: Scoring) -> Looking:
        chosen = ws.empty(len(looking.q), self.pages.table.shape[1], self.count, dtype=torch.int32)
        pages.select(self.pages, rows, looking.q, chosen, ws)
        return looking._replace(chosen=chosen)

    def among(self, slot: int) -> list[int]:
        return [PAGE * count for count in self.pages.bounded[slot].tolist()]

    def index_bytes(self, slot: int) -> int:
        assert self.pages.bounds is not None
        return int(self.pages.bounded[slot].sum()) * self.pages.bounds[0, 0, 0].nbytes


class Reused(ByBounds):
    """The same, chosen at every ``every``-th token after those that became certain together. After each token it is
    known which pages are ``chosen``, and how many tokens ago, their ``age``."""

    def __init__(self, where: Where, count: int, every: int) -> None:
        super().__init__(where, count)
        self.every = every
        self.states = Tentative(where.sequences, where.tail, where.arena)
        self.chosen = self.states.add(where.layout.kv_heads, count, dtype=torch.int32)
        self.age = self.states.add(dtype=torch.int32)

    def look(self, rows: Rows, looking: Looking, ws: Workspace, scoring: Scoring) -> Looking:
        chosen = ws.empty(len(looking.q), *self.chosen.shape[2:], dtype=torch.int32)
        with ws.frame():
            _choose(self, rows, looking.q, chosen, pages.select_scratch(self.pages, ws))
        return looking._replace(chosen=chosen)

    def index_bytes(self, slot: int) -> int:
        return super().index_bytes(slot) // self.every

    def settled(self, slot: int, now: Settled, ws: Workspace) -> None:
        self.age[slot] = NEVER

    def commit(self, slot: int, path: Sequence[int]) -> None:
        self.states.commit(slot, path)

    def reset(self, slot: int) -> None:
        self.age[slot] = NEVER

    def parts(self, slot: int) -> Iterator[torch.Tensor]:
        yield from self.states.parts(slot)


@op
def _choose(state: Reused, rows: Rows, q: torch.Tensor, chosen_: torch.Tensor, scratch_: torch.Tensor) -> None:
    """The pages (n, kv_heads, count) of rows with queries ``q`` (n, heads, key_dim)."""
    for row, slot, before, after in state.states.steps(rows, state.pages.tokens, len(q)):
        age = int(state.age[slot, before]) + 1
        state.age[slot, after] = age if age < state.every else 0
        if age < state.every:
            state.chosen[slot, after] = state.chosen[slot, before]
        else:
            one = slice(row, row + 1)
            pages.select_in_op(state.pages, Rows(rows.places[one]), q[one], state.chosen[slot, after][None], scratch_)
        chosen_[row] = state.chosen[slot, after]
