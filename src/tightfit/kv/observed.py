"""What tokens received from the queries that an evictor observes, kept with them until it judges them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import ops, pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import Looking, Pages, Rows, Run
from tightfit.kv.base import BLOCK, LayerLayout
from tightfit.kv.cache import numbers, place
from tightfit.kv.drafts import Drafts
from tightfit.kv.method import Evictor


class Observed:
    """Of each layer ``mass`` (sequences, kv_heads, blocks, n) float32: what each token received from a block of
    queries, the newest block first, put together as the evictor's ``fold`` says.

    Where all queries are observed there is one block. Of the last ones, so many blocks are kept that they always hold
    the evictor's ``window``: tokens that decode fill the first one until tokens are judged, of a chunk every 32 queries
    are a block. ``since`` (sequences, blocks) int32 are the positions at which blocks begin.
    """

    def __init__(
        self,
        evictor: Evictor,
        layouts: Sequence[LayerLayout],
        widths: Sequence[int],
        of_owners: Callable[[Callable[[int], torch.Tensor]], list[torch.Tensor]],
        sequences: int,
        tail: int,
        arena: Arena,
    ) -> None:
        self.evictor, self._widths, self._layouts = evictor, widths, layouts
        self.all = evictor.observes != "last"
        # One more than a window has where blocks are full: some are not.
        self.blocks = 1 if self.all or evictor.window == 1 else -(-evictor.window // BLOCK) + 1
        self.since = numbers(arena, sequences, self.blocks)
        self.mass = of_owners(
            lambda layer: place(arena, (sequences, layouts[layer].kv_heads, self.blocks, widths[layer]), torch.float32)
        )
        self.drafts = [Drafts(layout, sequences, tail, arena) for layout in layouts if tail > 1]

    def clear(self, slot: int) -> None:
        self.since[slot] = 0
        for mass in self.mass:
            mass[slot] = 0.0

    @property
    def window(self) -> int:
        """How many last queries are wanted, if not all."""
        return 0 if self.all else self.evictor.window

    # ---- what queries give ----

    def room(self, layer: int, count: int, ws: Workspace) -> torch.Tensor:
        """Zeros (kv_heads, blocks, tokens), for what the certain tokens and ``count`` others receive."""
        given = ws.empty(self._layouts[layer].kv_heads, self.blocks, self._widths[layer] + count)
        ops.zero_(given)
        return given

    def rows(
        self, layer: int, kept: Pages, rows: Rows, looking: Looking, lse: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        """Notes what certain rows that decode give."""
        last = BLOCK if self.all else min(self.evictor.window, BLOCK)
        pages.weigh_rows(kept, rows, looking, lse, self.mass[layer], ws, scoring, self.evictor.fold, last)

    def chunk(
        self,
        kept: Pages,
        slot: int,
        run: Run,
        at: int,
        looking: Looking,
        lse: torch.Tensor,
        given_: torch.Tensor,
        ws: Workspace,
        scoring: Scoring,
    ) -> None:
        """Notes in ``given`` what those queries of a run give, the first of which is its token ``at``, that are
        observed."""
        count = len(looking.q)
        for block, (start, stop) in enumerate(self._parts(count)):
            turned = None if looking.anchor_q is None else looking.anchor_q[start:stop]
            part = Looking(looking.q[start:stop], turned, looking.anchors)
            to = given_[:, block]
            pages.weigh(kept, slot, run, at + start, part, lse[start:stop], to, ws, scoring, self.evictor.fold)

    def _parts(self, count: int) -> list[tuple[int, int]]:
        """Of so many queries those that make blocks, the last ones first."""
        if self.all:
            return [(0, count)]
        first = max(count - self.evictor.window, 0)
        return [(max(stop - BLOCK, first), stop) for stop in range(count, first, -BLOCK)]

    # ---- when tokens are judged ----

    def recall(self, layer: int, slot: int, given_: torch.Tensor, lengths: list[int], tokens: int, count: int) -> None:
        """Puts what tokens received before into ``given``, behind what the ``count`` last of ``tokens`` gave."""
        first, taken = self._earlier(slot, tokens, count)
        before = self.mass[layer][slot, :, first:]
        to = given_[:, taken : taken + before.shape[1]]
        for head, length in enumerate(lengths):
            to[head, :, :length] = self._put_together(to[head, :, :length], before[head, : to.shape[1], :length])

    def judged(self, slot: int, given: torch.Tensor, tokens: int, count: int) -> tuple[torch.Tensor, int]:
        """(kv_heads, n): what tokens received from those blocks of ``given`` that are needed to have a window, and
        where these begin."""
        starts = self._starts(slot, tokens, count)
        needed = 1
        while needed < len(starts) and tokens - starts[needed - 1] < self.evictor.window:
            needed += 1
        mass = given[:, 0].clone()
        for block in range(1, needed):
            mass = self._put_together(mass, given[:, block])
        return mass, starts[needed - 1]

    def keep(self, layer: int, slot: int, given: torch.Tensor, counts: list[int]) -> None:
        """Keeps what the first ``counts`` tokens of each head received, in another block than what comes."""
        mass, fresh = self.mass[layer][slot], 0 if self.all else 1
        mass[:] = 0.0
        for head, count in enumerate(counts):
            mass[head, fresh:, :count] = given[head, : self.blocks - fresh, :count]

    def advance(self, slot: int, tokens: int, count: int) -> None:
        """All layers were judged when there were ``tokens``, of which the last ``count`` came as a chunk."""
        if not self.all:
            starts = [tokens, *self._starts(slot, tokens, count)][: self.blocks]
            self.since[slot, : len(starts)] = torch.tensor(starts, dtype=torch.int32)

    def _put_together(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.maximum(b) if self.evictor.fold == "max" else a + b

    def _earlier(self, slot: int, tokens: int, count: int) -> tuple[int, int]:
        """The first block that is still wanted after a chunk of ``count`` tokens, and behind how many new ones."""
        if self.all or not count:
            return 0, 0
        if count >= self.evictor.window:
            return self.blocks, 0
        empty = int(self.since[slot, 0]) == tokens - count
        return int(empty), len(self._parts(count))

    def _starts(self, slot: int, tokens: int, count: int) -> list[int]:
        """Where the blocks of queries begin by which tokens are judged now."""
        first, _ = self._earlier(slot, tokens, count)
        new = [tokens - count + start for start, _ in self._parts(count)] if count else []
        return [*new, *self.since[slot, first:].tolist()][: self.blocks]

    # ---- drafts ----

    def commit_drafts(
        self,
        slot: int,
        path: torch.Tensor,
        start: int,
        layers: Sequence[Pages],
        look: Callable[[int, Rows, torch.Tensor, torch.Tensor | None, Workspace, Scoring], Looking],
        ws: Workspace,
    ) -> None:
        """Notes what the tentative tokens of ``path`` (n,) int32 gave, which are the first behind ``start`` now.
        ``look`` says how they did, each layer as it did then."""
        places = torch.tensor([(slot, start + index) for index in range(len(path))], dtype=torch.int32).view(-1, 2)
        # Where layers share what tokens received, it is summed up in the order in which they decode: token by token.
        shared = len({id(mass) for mass in self.mass}) < len(self.mass)
        for part in torch.arange(len(path)).split(1 if shared else max(len(path), 1)):
            for layer, (kept, drafts) in enumerate(zip(layers, self.drafts, strict=True)):
                with ws.frame():
                    rows, which = Rows(places[part]), path[part]
                    q, turned = drafts.q[slot, which], drafts.turned(slot, which)
                    looking = look(layer, rows, q, turned, ws, drafts.scoring)
                    self.rows(layer, kept, rows, looking, drafts.lse[slot, which], ws, drafts.scoring)
