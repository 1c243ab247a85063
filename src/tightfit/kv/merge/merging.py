"""Merges what is let go of into what stays, before pages are written."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import ops
from tightfit.kernels.pages import Pages, Run
from tightfit.kv.merge.nearest import compare_neighbours, scale_rows_
from tightfit.kv.merge.tokens import TokensAt, leaving
from tightfit.kv.method import Judged, Leaving, Merger, Seen, Tokens


@dataclass(frozen=True)
class Merging:
    """Of one ``layer``: ``memory`` (sequences, kv_heads, n) float32 is what ``merger`` remembers; a head has at most
    ``most`` tokens."""

    merger: Merger
    layer: int
    pages: Pages
    memory: torch.Tensor
    most: int

    def compare(self, slot: int, run: Run, counts: list[int], ws: Workspace) -> torch.Tensor | None:
        """The cosine of each key and the one before it, (kv_heads, n), of a head's ``counts`` tokens and the run behind
        them, if the merger wants to know."""
        if not self.merger.compares:
            return None
        kept = self.pages
        alike = ws.empty(len(counts), self.most + run.count)[:, : max(counts)]
        ops.zero_(alike)
        for head, count in enumerate(counts):
            with ws.frame():
                before, at = ws.empty(kept.keys.shape[3]), 0
                ops.zero_(before)
                for block in TokensAt(kept, slot, head, run, torch.arange(count), ws).blocks():
                    lengths = ws.empty(len(block.keys))
                    compare_neighbours(block.keys, before, lengths, alike[head, at : at + len(block.keys)])
                    at += len(block.keys)
        return alike

    def merge(
        self,
        slot: int,
        run: Run,
        staying: tuple[torch.Tensor, list[int]],
        seen: Seen,
        ws: Workspace,
    ) -> torch.Tensor:
        """Merges tokens that are let go of, and will still be seen, into those that stay: indices (kv_heads, m) int32
        and how many for each head. What changes by that lies in the run, behind its own tokens; gives the indices by
        which it is found there."""
        indices = staying[0].clone()
        for head, (total, count) in enumerate(zip(seen.counts, staying[1], strict=True)):
            stays = indices[head, :count].long()
            going = leaving(total, stays, (seen.positions[head] > seen.horizon)[:total])
            if not len(going):
                continue
            alike = None if seen.alike is None else seen.alike[head, :total]
            numbers = seen.positions[head, :total], seen.mass[head, :total], alike
            judged = Judged(self.layer, stays, *numbers, decoding=seen.tokens > seen.prompt)
            with ws.frame():
                tokens, changed = self._head(slot, head, run, going, judged, ws)
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
        self.compare(slot, run, [most + run.count] * self.pages.table.shape[1], ws)
        nothing = torch.zeros(most + run.count)
        with ws.frame():
            judged = Judged(self.layer, torch.arange(most), nothing.int(), nothing, nothing, decoding=not run.count)
            self._head(slot, 0, run, torch.arange(most + run.count), judged, ws)

    def _head(
        self, slot: int, head: int, run: Run, going: torch.Tensor, judged: Judged, ws: Workspace
    ) -> tuple[Tokens, torch.Tensor]:
        """The tokens of a head that stay, after those at ``going`` (n,) int64 were merged into them, and which of them
        were changed."""
        kept, places = self.pages, judged.stays
        values = None if kept.shared else ws.empty(len(places), kept.values.shape[3])
        staying, at = Tokens(ws.empty(len(places), kept.keys.shape[3]), values), 0
        for block in TokensAt(kept, slot, head, run, places, ws).blocks():
            for whole, part in zip(staying, block, strict=True):
                if whole is not None and part is not None:
                    ops.copy_(whole[at : at + len(part)], part)
            at += len(block.keys)
        from_there = TokensAt(kept, slot, head, run, going, ws)
        changed = self.merger.merge(staying, from_there, judged, self.memory[slot, head], ws)
        return staying, changed


def blend(
    staying_: Tokens,
    leaving: Leaving,
    into: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    own: torch.Tensor,
) -> None:
    """Each token that stays becomes its share ``own`` (m,) of itself, and the tokens that are let go of and come
    ``into`` it (n,) int64, their keys and their values with ``weights`` (n,) each."""
    for kept in staying_:
        if kept is not None:
            scale_rows_(kept, own)
    at = 0
    for block in leaving.blocks():
        here = slice(at, at + len(block.keys))
        for kept, added, weight in zip(staying_, block, weights, strict=True):
            if kept is not None and added is not None:
                ops.add_rows_(kept, into[here], added, weight[here])
        at = here.stop
