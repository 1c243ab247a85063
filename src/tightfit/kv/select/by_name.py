"""The tokens that a text itself names."""

from __future__ import annotations

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels.attention import Scoring
from tightfit.kernels.ops import op
from tightfit.kernels.pages import Looking, Rows
from tightfit.kv.select.selecting import Selecting, Where, room_for_lists


class ByName(Selecting):
    """All heads of all layers read what is named."""

    def __init__(self, where: Where) -> None:
        if where.names is None:
            raise ValueError("nothing reads what is named")
        self.pages, self.names = where.pages, where.names

    def look(self, rows: Rows, looking: Looking, ws: Workspace, scoring: Scoring) -> Looking:
        kv_heads, count = self.pages.table.shape[1], self.names.listed.shape[1]
        listed, since = room_for_lists(len(looking.q), kv_heads, count, ws)
        _spread(rows.places, self.names.listed, self.names.since, listed, since)
        return looking._replace(listed=listed, since=since)

    def among(self, slot: int) -> list[int]:
        return self.pages.lengths[slot].tolist()


@op
def _spread(
    places: torch.Tensor, listed: torch.Tensor, since: torch.Tensor, listed_: torch.Tensor, since_: torch.Tensor
) -> None:
    """Gives each row, in all heads, what its sequence names."""
    for row, slot in enumerate(places[: len(listed_), 0].tolist()):
        listed_[row] = listed[slot]
        since_[row] = since[slot]
