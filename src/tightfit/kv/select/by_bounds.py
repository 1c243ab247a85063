"""Pages by the largest score that their bounds allow."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import PAGE, Looking, Pages, Rows
from tightfit.kv.select.selecting import Selecting


@dataclass(frozen=True)
class ByBounds(Selecting):
    """``count`` pages, of those that have bounds."""

    pages: Pages
    count: int

    def look(self, rows: Rows, looking: Looking, ws: Workspace, scoring: Scoring) -> Looking:
        n, kv_heads = looking.q.shape[0], self.pages.table.shape[1]
        chosen = ws.empty(n, kv_heads, self.count, dtype=torch.int32)
        pages.select(self.pages, rows, looking.q, chosen, ws)
        return looking._replace(chosen=chosen)

    def among(self, slot: int) -> list[int]:
        return [PAGE * count for count in self.pages.bounded[slot].tolist()]

    def index_bytes(self, slot: int) -> int:
        return int(self.pages.bounded[slot].sum()) * 2 * self.pages.keys.shape[3] * self.pages.keys.element_size()
