"""What was let go of, as far as it still counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import ops
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import Pages, Run
from tightfit.kv.merge.tokens import TokensAt, leaving
from tightfit.kv.method import Rest


@dataclass(frozen=True)
class Resting:
    """Of layer ``layer``: ``memory`` (sequences, kv_heads, n) float32 are the states of ``rest``; a head has at most
    ``most`` tokens."""

    rest: Rest
    layer: int
    pages: Pages
    memory: torch.Tensor
    most: int

    def take_up(
        self, slot: int, run: Run, staying: tuple[torch.Tensor, list[int]], seen: torch.Tensor, ws: Workspace
    ) -> None:
        """Takes up the tokens, of those ``seen`` (kv_heads, n) bool by queries to come, that do not stay: indices
        (kv_heads, m) int32 and how many for each head."""
        for head, count in enumerate(staying[1]):
            going = leaving(self.pages, slot, head, run, staying[0][head, :count].long(), seen[head])
            if len(going):
                with ws.frame():
                    self._take_up(slot, head, run, going, ws)

    def take_most(self, slot: int, run: Run, ws: Workspace) -> None:
        """Takes the scratch of taking up as many tokens as can be."""
        with ws.frame():
            self._take_up(slot, 0, run, torch.arange(self.most + run.count), ws)

    def _take_up(self, slot: int, head: int, run: Run, going: torch.Tensor, ws: Workspace) -> None:
        tokens = TokensAt(self.pages, slot, head, run, going, ws)
        self.rest.take_up(self.layer, head, tokens, self.memory[slot, head], ws)

    def recall(
        self,
        slots: torch.Tensor,
        q: torch.Tensor,
        scoring: Scoring,
        out_: torch.Tensor,
        lse_: torch.Tensor,
        ws: Workspace,
    ) -> None:
        """Adds what queries ``q`` (n, heads, key_dim) of the sequences ``slots`` (n,) int32 find in the states to their
        attention ``out`` (n, heads, value_dim), whose softmax divides by ``lse`` (n, heads)."""
        with ws.frame():
            found, lse = ws.empty(*out_.shape), ws.empty(*lse_.shape)
            self.rest.recall(self.layer, self.memory, slots, q, scoring, found, lse, ws)
            ops.merge_(out_, lse_, found, lse)
