"""What tokens received from the queries that an evictor observes, kept with them until it judges them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import ops, pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import Looking, Pages, Rows, Run
from tightfit.kv.base import BLOCK, LayerLayout
from tightfit.kv.cache import numbers, place
from tightfit.kv.drafts import Drafts
from tightfit.kv.method import Evictor, Streamer


class Chunk(NamedTuple):
    """Queries of a prompt that have looked at a layer, (n, heads): those of tokens ``at`` onwards of ``run``, which
    come behind what the sequence ``slot`` has in ``kept``; ``lse`` (n, heads) is the log-sum-exp of their scores."""

    kept: Pages
    slot: int
    run: Run
    at: int
    looking: Looking
    lse: torch.Tensor
    scoring: Scoring

    def part(self, start: int, stop: int) -> Chunk:
        """Some of these queries."""
        return self._replace(at=self.at + start, looking=self.looking.part(start, stop), lse=self.lse[start:stop])

    def weigh(self, given_: torch.Tensor, ws: Workspace, fold: str) -> None:
        """Notes in ``given`` (kv_heads, tokens) what tokens receive, put together as ``fold`` says."""
        kept, slot, run, at, looking, lse, scoring = self
        pages.weigh(kept, slot, run, at, looking, lse, given_, ws, scoring, fold)


class Observer:
    """Sums up what tokens receive from those queries of a prompt's chunk that ``method`` observes, in scratch memory:
    from blocks of 32 of the last ones, the newest first, and behind these, where all are observed, from all of them.
    Layers have up to ``widths`` tokens."""

    def __init__(
        self, method: Evictor | Streamer, layouts: Sequence[LayerLayout], widths: Sequence[int], blocks: int
    ) -> None:
        self.method, self.blocks, self._widths, self._layouts = method, blocks, widths, layouts
        self.all = method.observes != "last"
        self.last = method.observes in ("last", "both")
        self._planes = blocks + int(self.all)

    @property
    def window(self) -> int:
        """How many last queries are wanted for themselves."""
        return self.method.window if self.last else 0

    def room(self, layer: int, count: int, ws: Workspace) -> torch.Tensor:
        """Zeros (kv_heads, planes, tokens), for what the certain tokens and ``count`` others receive."""
        given = ws.empty(self._layouts[layer].kv_heads, self._planes, self._widths[layer] + count)
        ops.zero_(given)
        return given

    def chunk(self, chunk: Chunk, given_: torch.Tensor, ws: Workspace) -> None:
        """Notes in ``given`` what those queries of a chunk give that are observed."""
        if self.all:
            self.everything(chunk, given_, ws)
        if self.last:
            self.lately(chunk, given_, ws)

    def everything(self, chunk: Chunk, given_: torch.Tensor, ws: Workspace) -> None:
        """What :meth:`chunk` notes of all queries."""
        chunk.weigh(given_[:, self.blocks], ws, self.method.fold)

    def lately(self, chunk: Chunk, given_: torch.Tensor, ws: Workspace) -> None:
        """What :meth:`chunk` notes of the last queries."""
        for block, (start, stop) in enumerate(self._parts(len(chunk.lse))):
            chunk.part(start, stop).weigh(given_[:, block], ws, self.method.fold)

    def _parts(self, count: int) -> list[tuple[int, int]]:
        """Of so many queries those that make blocks, the last ones first."""
        first = max(count - self.method.window, 0)
        return [(max(stop - BLOCK, first), stop) for stop in range(count, first, -BLOCK)]


class Observed(Observer):
    """Of each layer ``mass`` (sequences, kv_heads, planes, n) float32: what each token received from a block of
    queries, the newest block first, put together as the evictor's ``fold`` says; and behind these, where all queries
    are observed, from all of them.

    Of the last queries, so many blocks are kept that they always hold the evictor's ``window``: tokens that decode fill
    the first one until tokens are judged, of a chunk every 32 queries are a block. ``since`` (sequences, blocks) int32
    are the positions at which blocks begin.
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
        # One more than a window has where blocks are full: some are not.
        blocks = 1 if evictor.window == 1 else -(-evictor.window // BLOCK) + 1
        super().__init__(evictor, layouts, widths, blocks if evictor.observes in ("last", "both") else 0)
        self.evictor = evictor
        self.since = numbers(arena, sequences, self.blocks)
        self.mass = of_owners(
            lambda layer: place(arena, (sequences, layouts[layer].kv_heads, self._planes, widths[layer]), torch.float32)
        )
        self.drafts = [Drafts(layout, sequences, tail, arena) for layout in layouts if tail > 1]

    def clear(self, slot: int) -> None:
        self.since[slot] = 0
        for mass in self.mass:
            mass[slot] = 0.0

    def rows(
        self, layer: int, kept: Pages, rows: Rows, looking: Looking, lse: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        """Notes what certain rows that decode give."""
        mass, fold = self.mass[layer], self.evictor.fold
        if self.last:
            pages.weigh_rows(kept, rows, looking, lse, mass, ws, scoring, fold, min(self.evictor.window, BLOCK))
        if self.all:
            pages.weigh_rows(kept, rows, looking, lse, mass[:, :, self.blocks :], ws, scoring, fold)

    # ---- when tokens are judged ----

    def recall(self, layer: int, slot: int, given_: torch.Tensor, lengths: list[int], tokens: int, count: int) -> None:
        """Puts what tokens received before into ``given``, behind what the ``count`` last of ``tokens`` gave."""
        before, pairs = self.mass[layer][slot], [(self.blocks, self.blocks)] if self.all else []
        if self.last:
            first, taken = self._earlier(slot, tokens, count)
            pairs += zip(range(taken, self.blocks), range(first, self.blocks), strict=False)
        for to, plane in pairs:
            for head, length in enumerate(lengths):
                self._put_together_(given_[head, to, :length], before[head, plane, :length])

    def judged(
        self, slot: int, given: torch.Tensor, tokens: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """What tokens received from all queries, (kv_heads, n), and from the last ones; where only these are observed,
        the first of both is theirs. And where the last ones, or all, begin."""
        everything = given[:, self.blocks].clone() if self.all else None
        if not self.last:
            assert everything is not None
            return everything, None, 0
        lately, since = self._lately(slot, given, tokens, count)
        return (lately, None, since) if everything is None else (everything, lately, since)

    def _lately(self, slot: int, given: torch.Tensor, tokens: int, count: int) -> tuple[torch.Tensor, int]:
        """(kv_heads, n): what tokens received from those blocks of ``given`` that are needed to have a window, and
        where these begin."""
        starts = self._starts(slot, tokens, count)
        needed = 1
        while needed < len(starts) and tokens - starts[needed - 1] < self.evictor.window:
            needed += 1
        mass = given[:, 0].clone()
        for block in range(1, needed):
            self._put_together_(mass, given[:, block])
        return mass, starts[needed - 1]

    def keep(self, layer: int, slot: int, given: torch.Tensor, counts: list[int]) -> None:
        """Keeps what the first ``counts`` tokens of each head received, in another block than what comes."""
        mass, blocks = self.mass[layer][slot], self.blocks
        mass[:] = 0.0
        for head, count in enumerate(counts):
            mass[head, 1:blocks, :count] = given[head, : max(blocks - 1, 0), :count]
            mass[head, blocks:, :count] = given[head, blocks:, :count]

    def let_go(self, layer: int, slot: int, places: torch.Tensor) -> None:
        """Keeps what tokens at ``places`` (kv_heads, n) int64 received, as what the first ones did."""
        mass, count = self.mass[layer][slot], places.shape[1]
        mass[..., :count] = mass.gather(2, places[:, None].expand(-1, self._planes, -1))
        mass[..., count:] = 0.0

    def advance(self, slot: int, tokens: int, count: int) -> None:
        """All layers were judged when there were ``tokens``, of which the last ``count`` came as a chunk."""
        if self.last:
            starts = [tokens, *self._starts(slot, tokens, count)][: self.blocks]
            self.since[slot, : len(starts)] = torch.tensor(starts, dtype=torch.int32)

    def _put_together_(self, a_: torch.Tensor, b: torch.Tensor) -> None:
        if self.evictor.fold == "max":
            torch.maximum(a_, b, out=a_)
        else:
            a_ += b

    def _earlier(self, slot: int, tokens: int, count: int) -> tuple[int, int]:
        """The first block that is still wanted after a chunk of ``count`` tokens, and behind how many new ones."""
        if not count:
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
