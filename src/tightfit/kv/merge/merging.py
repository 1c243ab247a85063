"""Merges what is let go of into what stays, before pages are written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import ops
from tightfit.kernels.pages import Pages, Run
from tightfit.kv.merge.tokens import TokensAt, leaving
from tightfit.kv.method import Merger, Tokens


@dataclass(frozen=True)
class Merging:
    """Of one layer: ``memory`` (sequences, kv_heads, n) float32 is what ``merger`` remembers; a head has at most
    ``most`` tokens."""

    merger: Merger
    pages: Pages
    memory: torch.Tensor
    most: int

    def merge(
        self,
        slot: int,
        run: Run,
        staying: tuple[torch.Tensor, list[int]],
        seen: torch.Tensor,
        ws: Workspace,
    ) -> torch.Tensor:
        """Merges tokens that are let go of, and ``seen`` (kv_heads, n) bool by queries to come, into those that stay:
        indices (kv_heads, m) int32 and how many for each head. What changes by that lies in the run, behind its own
        tokens; gives the indices by which it is found there."""
        kept, indices = self.pages, staying[0].clone()
        for head, count in enumerate(staying[1]):
            total = int(kept.lengths[slot, head]) + run.count
            places = indices[head, :count].long()
            going = leaving(kept, slot, head, run, places, seen[head])
            if not len(going):
                continue
            with ws.frame():
                tokens, changed = self._head(slot, head, run, places, going, ws)
                which = changed.nonzero()[:, 0]
                behind = slice(run.count, run.count + len(which))
                for of_run, merged in zip((run.keys, run.values), tokens, strict=True):
                    if merged is not None:
                        of_run[head, behind] = merged[which].to(of_run.dtype)
                indices[head, which] = torch.arange(total, total + len(which), dtype=torch.int32)
        return indices

    def take_most(self, slot: int, run: Run, ws: Workspace) -> None:
        """Takes the scratch of merging as many tokens into as many others as can be."""
        most = self.most
        with ws.frame():
            self._head(slot, 0, run, torch.arange(most), torch.arange(most + run.count), ws)

    def _head(
        self,
        slot: int,
        head: int,
        run: Run,
        places: torch.Tensor,
        going: torch.Tensor,
        ws: Workspace,
    ) -> tuple[Tokens, torch.Tensor]:
        """The tokens at ``places`` (m,) int64 of a head, ascending, after those at ``going`` (n,) were merged into
        them, and which of them were changed."""
        kept = self.pages
        values = None if kept.shared else ws.empty(len(places), kept.values.shape[3])
        staying, at = Tokens(ws.empty(len(places), kept.keys.shape[3]), values), 0
        for block in TokensAt(kept, slot, head, run, places, ws).blocks():
            for whole, part in zip(staying, block, strict=True):
                if whole is not None and part is not None:
                    ops.copy_(whole[at : at + len(part)], part)
            at += len(block.keys)
        from_there = TokensAt(kept, slot, head, run, going, ws)
        changed = self.merger.merge(staying, from_there, self.memory[slot, head], ws)
        return staying, changed
