"""What chooses by a copy in few bits, and reads ahead what is next in its order."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import ops, pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import PAGE, Looking, Rows
from tightfit.kv.lower import LowerStore, alone
from tightfit.kv.select.selecting import Selecting, Settled, Where


class Speculating(Selecting):
    """Of one layer: the copy ``low`` of all whole pages, by which ``count`` pages are chosen, and then ``more``."""

    joins = True

    def __init__(self, where: Where, low: LowerStore, count: int, more: int) -> None:
        self.pages, self.low = where.pages, low
        self.count, self.more = count, more

    def look(self, rows: Rows, looking: Looking, ws: Workspace, scoring: Scoring) -> Looking:
        n, (kv_heads, table_pages) = len(looking.q), self.pages.table.shape[1:]
        chosen, self._next, self._others = (
            ws.empty(n, kv_heads, width, dtype=torch.int32) for width in (self.count, self.more, table_pages)
        )
        pages.rank(self.low.pages, rows, looking.q, chosen, self._next, self._others, ws)
        return looking._replace(chosen=chosen)

    def join_rows(
        self, rows: Rows, looking: Looking, out_: torch.Tensor, lse_: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        pages.prefetch(self.pages, rows, self._next)
        with ws.frame():
            part, sums = ws.empty(*out_.shape), ws.empty(*lse_.shape)
            others = Looking(looking.q, chosen=self._others, certain=True)
            pages.attend_rows(self.low.pages, Rows(rows.places), others, part, sums, ws, alone(scoring))
            pages.join(out_, lse_, part, sums)

    def among(self, slot: int) -> list[int]:
        return [PAGE * count for count in self.pages.bounded[slot].tolist()]

    def index_bytes(self, slot: int) -> int:
        low = self.low.pages  # keys twice: to choose, and with the values as what was not chosen is seen
        return int(self.pages.bounded[slot].sum()) * (2 * low.key_codec.page_bytes + low.value_codec.page_bytes)

    def settled(self, slot: int, now: Settled, ws: Workspace) -> None:
        self.low.copy(slot, self.pages, ws)
        if ops.is_dry():
            return
        for kept in (self.pages, self.low.pages):
            kept.bounded[slot] = self.low.pages.lengths[slot] // PAGE

    def reset(self, slot: int) -> None:
        self.low.pages.reset(slot)

    def parts(self, slot: int) -> Iterator[torch.Tensor]:
        for part in self.low.parts(slot):
            assert isinstance(part, torch.Tensor)  # a copy has no file
            yield part
