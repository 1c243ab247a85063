"""What was let go of, as far as it still counts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import ops, pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import PAGE, Pages, Rows, Run
from tightfit.kv.base import LayerLayout
from tightfit.kv.beside import Beside, Going
from tightfit.kv.cache import as_bytes, place
from tightfit.kv.merge.tokens import TokensAt
from tightfit.kv.method import Rest


class Resting(Beside):
    """Of layer ``layer`` the states of ``rest``, ``memory`` (sequences, kv_heads, n) float32."""

    def __init__(self, rest: Rest, layer: int, layout: LayerLayout, sequences: int, arena: Arena) -> None:
        self.rest, self.layer = rest, layer
        self.memory = place(arena, (sequences, layout.kv_heads, rest.remembers(layout)), torch.float32)

    def take(self, going: Going, ws: Workspace) -> None:
        for head in range(len(going.counts)):
            places = going.places(head, seen=True)
            if len(places):
                self._take(going.slot, head, going.upper, going.run, places, ws)

    def take_most(self, slot: int, upper: Pages, run: Run, ws: Workspace) -> None:
        self._take(slot, 0, upper, run, torch.arange(upper.table.shape[2] * PAGE + run.count), ws)

    def _take(self, slot: int, head: int, upper: Pages, run: Run, going: torch.Tensor, ws: Workspace) -> None:
        with ws.frame():
            tokens = TokensAt(upper, slot, head, run, going, ws)
            self.rest.take_up(self.layer, head, tokens, self.memory[slot, head], ws)

    def join_rows(
        self, rows: Rows, q: torch.Tensor, out_: torch.Tensor, lse_: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        with ws.frame():
            found, lse = ws.empty(*out_.shape), ws.empty(*lse_.shape)
            self.rest.recall(self.layer, self.memory, rows.places[: len(q), 0], q, scoring, found, lse, ws)
            pages.join(out_, lse_, found, lse)

    def join(
        self,
        slot: int,
        q: torch.Tensor,
        out_: torch.Tensor,
        lse_: torch.Tensor,
        ws: Workspace,
        scoring: Scoring,
        bf16: bool,
    ) -> None:
        with ws.frame():
            places = ws.empty(len(q), 2, dtype=torch.int32)
            ops.fill_(places, slot)
            self.join_rows(Rows(places), q, out_, lse_, ws, scoring)

    def clear(self, slot: int) -> None:
        self.memory[slot] = 0.0

    def parts(self, slot: int) -> Iterator[torch.Tensor]:
        yield as_bytes(self.memory[slot])
