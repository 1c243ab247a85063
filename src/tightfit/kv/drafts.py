"""What tentative tokens look with, until it is known which of them stay."""

from __future__ import annotations

import torch

from tightfit.budget.ledger import Arena
from tightfit.kernels import ops
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import Looking, Rows
from tightfit.kv.base import LayerLayout
from tightfit.kv.cache import place


class Drafts:
    """What tentative tokens of a layer look with: queries (sequences, tail, heads, key_dim), and lse."""

    def __init__(self, layout: LayerLayout, sequences: int, tail: int, arena: Arena) -> None:
        shape = (sequences, tail, layout.heads)
        self.q = place(arena, (*shape, layout.key_dim), torch.float32)
        self.anchor_q = place(arena, (*shape, layout.key_dim), torch.float32)
        self.lse = place(arena, shape, torch.float32)
        self.scoring = Scoring(1.0)
        self._anchored = False

    def put(self, rows: Rows, tokens: torch.Tensor, looking: Looking, lse: torch.Tensor, scoring: Scoring) -> None:
        """Keeps those of a step."""
        self.scoring, self._anchored = scoring, looking.anchor_q is not None
        if ops.is_dry():
            return
        slots, places = rows.places[: len(lse)].long().unbind(1)
        order = places - tokens[slots]
        self.q[slots, order] = looking.q
        self.lse[slots, order] = lse
        if looking.anchor_q is not None:
            self.anchor_q[slots, order] = looking.anchor_q

    def turned(self, slot: int, order: torch.Tensor) -> torch.Tensor | None:
        return self.anchor_q[slot, order] if self._anchored else None
