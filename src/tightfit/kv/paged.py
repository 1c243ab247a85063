"""A cache that lets go of tokens, stores them in few bits, reads only some of them or keeps them in a file.

All of these are the same store of pages (:mod:`tightfit.kernels.pages`) with another list of tokens or another kind of
page. What a prompt's chunk adds lies in scratch memory while its layer is computed; then it is certain, methods judge
it, and what stays is written. What decoding adds is tentative until :meth:`PagedCache.commit`; tokens are judged, coded
and moved when their sequence has a multiple of 32 tokens, never between, so that drafts which are refused leave no
trace.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.errors import TightfitError, UsageError
from tightfit.kernels import attention, ops, pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import PAGE, Codec, Looking, Pages, Rows, Run
from tightfit.kv import budgets
from tightfit.kv.base import BLOCK, BaseCache, LayerLayout, Move, Step, Turn
from tightfit.kv.cache import as_bytes, place
from tightfit.kv.compose import Composition
from tightfit.kv.drafts import Drafts
from tightfit.kv.evict.window import Window
from tightfit.kv.merge.tokens import TokensAt
from tightfit.kv.method import Merger, Seen, Tokens

Made = TypeVar("Made")


@dataclass(frozen=True)
class Sizes:
    """What one layer reserves for each sequence: tokens ``kept`` by each head on average, the most that one head can
    have, and pages of all heads."""

    kept: int
    table_pages: int
    dense_pages: int
    coded_pages: int


@dataclass
class Held:
    """A step's tokens of one layer on their way through attention: the run of each prefill segment and the place of its
    first token there, and the queries that look at anchors."""

    runs: list[tuple[Run, int]]
    anchor_q: torch.Tensor | None


@dataclass
class Shared:
    """What several layers read of a prompt's tokens, and what those received from all of them so far."""

    run: Run
    given: torch.Tensor | None


@dataclass
class Whole:
    """A whole prompt on its way through one layer: what its last queries were, and what tokens received."""

    run: Run
    start: int
    last: int  # queries that are wanted
    q: torch.Tensor  # (last, heads, key_dim), with anchor_q and lse (last, heads)
    anchor_q: torch.Tensor
    lse: torch.Tensor
    given: torch.Tensor | None


class InFile(NamedTuple):
    """A page that lies in the file."""

    at: int
    nbytes: int


class PagedCache(BaseCache):
    """The cache of a composition; ``tail`` tokens of each sequence may be tentative at once."""

    whole_entries = True

    def __init__(
        self,
        layouts: list[LayerLayout],
        composition: Composition,
        context: int,
        sequences: int,
        dtype: torch.dtype,
        arena: Arena,
        gemm_dtype: torch.dtype = torch.float32,
        tail: int = 1,
        owners: Sequence[int] | None = None,
    ) -> None:
        composition.check(layouts)
        self.layouts = layouts
        self.owners = list(range(len(layouts)) if owners is None else owners)
        self._last = {owner: layer for layer, owner in enumerate(self.owners)}  # the last one that reads an owner's
        self.composition = composition
        self.context = context
        self.sequences = sequences
        self.dtype = dtype
        self.gemm_dtype = gemm_dtype
        self.tail = tail
        self.evictor = evictor = composition.evictor
        self.observes = "nothing" if evictor is None else evictor.observes
        self.anchors = 0 if evictor is None else evictor.anchors
        self.sizes = [self._size(layout, kept) for layout, kept in zip(layouts, self._kept(context), strict=True)]
        self._file = -1 if composition.tier is None else composition.tier.open()
        self._closing = weakref.finalize(self, os.close, self._file) if self._file >= 0 else lambda: None
        self._file_size = 0
        before = arena.used
        self.tokens = _numbers(arena, sequences)
        self.layers = self._of_owners(lambda layer: self._pages(layer, arena))
        self.merger = evictor if isinstance(evictor, Merger) else None
        self.memory: list[torch.Tensor] = []  # of each layer (sequences, kv_heads, numbers that the merger remembers)
        if self.merger is not None:
            numbers = self.merger.remembers
            self.memory = self._of_owners(
                lambda layer: place(arena, (sequences, layouts[layer].kv_heads, numbers), torch.float32)
            )
        self.mass: list[torch.Tensor] = []
        self.drafts: list[Drafts] = []
        if self.observes != "nothing":
            shapes = [
                (sequences, layout.kv_heads, size.table_pages * PAGE)
                for layout, size in zip(layouts, self.sizes, strict=True)
            ]
            self.mass = self._of_owners(lambda layer: place(arena, shapes[layer], torch.float32))
            self.drafts = [Drafts(layout, sequences, tail, arena) for layout in layouts if tail > 1]
        self._nbytes = arena.used - before
        self._begun = [False] * sequences
        self._drafting = [False] * sequences
        self._pruned = [False] * sequences
        self._whole: Whole | None = None
        self._shared: dict[int, list[Shared]] = {}  # of each owner that others read, for each prefill of a step

    @property
    def _stores(self) -> list[Pages]:
        return [self.layers[layer] for layer in self.own]

    def _of_owners(self, make: Callable[[int], Made]) -> list[Made]:
        """Of each layer what is made for its owner."""
        made = {layer: make(layer) for layer in self.own}
        return [made[owner] for owner in self.owners]

    def close(self) -> None:
        if self._file >= 0:
            self._closing()

    # ---- what is reserved ----

    @property
    def _ahead(self) -> int:
        """Tokens that may come between two moments at which tokens are let go of, and behind them tentative ones."""
        return BLOCK + self.tail

    def _kept(self, tokens: int) -> list[int]:
        """How many tokens each head of each layer keeps on average of so many that came."""
        evictor, own = self.evictor, self.own
        if evictor is None:
            return [tokens] * len(self.layouts)
        keep = min(evictor.kept(tokens), tokens)
        of_layers = budgets.of_layers(evictor.budget, keep, len(own), sum(evictor.protected(keep)), tokens)
        of_owners = dict(zip(own, of_layers, strict=True))
        return [of_owners[owner] for owner in self.owners]

    def _limit(self, layer: int, tokens: int) -> int:
        """As :meth:`_kept`, of one layer, whose queries may see no more than a window."""
        window = self.layouts[layer].window
        kept = min(max(self._kept(tokens)[layer], 1), self.sizes[layer].kept)
        return kept if window is None else min(kept, window)

    @property
    def _has_codes(self) -> bool:
        c = self.composition
        return c.key_codec is not None or c.value_codec is not None or c.pruner is not None

    def _size(self, layout: LayerLayout, kept: int) -> Sizes:
        kept = min(kept, self.context, layout.window or kept)
        heads, tier, recent = layout.kv_heads, self.composition.tier, self.composition.recent
        ragged = self.evictor is not None and self.evictor.budget == "adakv"
        more = self._ahead
        table_pages = -(-(min(kept * heads if ragged else kept, self.context) + more) // PAGE)
        # Of all heads together; each has a page that is not full.
        whole = heads * -(-(kept + more) // PAGE) + (heads if ragged else 0)
        if not self._has_codes:
            in_memory = whole if tier is None else heads * (-(-tier.resident // PAGE) + -(-more // PAGE) + 2)
            return Sizes(kept, table_pages, min(whole, in_memory), 0)
        # What is not coded yet; and while pages change their kind, that of one head once more.
        dense = heads * -(-(recent + PAGE - 1 + more) // PAGE) + -(-recent // PAGE) + 1
        coded = whole if tier is None else heads * (max(-(-tier.resident // PAGE) - recent // PAGE, 0) + 1)
        return Sizes(kept, table_pages, min(dense, whole + 1), min(whole, coded))

    def _pages(self, index: int, arena: Arena) -> Pages:
        layout, size, composition, sequences = self.layouts[index], self.sizes[index], self.composition, self.sequences
        heads, as_they_are = layout.kv_heads, 8 * self.dtype.itemsize
        pruner, key, value = composition.pruner, composition.key_codec, composition.value_codec
        width = layout.key_dim if pruner is None else pruner.kept(layout.key_dim)
        key_codec = Codec(as_they_are if key is None else key.bits, width, per_channel=True)
        value_codec = Codec(as_they_are if value is None else value.bits, layout.value_dim, per_channel=False)
        dense, coded = (sequences, size.dense_pages, PAGE), (sequences, size.coded_pages)
        keys = place(arena, (*dense, layout.key_dim), self.dtype)
        shared, listed = layout.shared, (sequences, heads, size.table_pages)
        values = keys[..., : layout.value_dim] if shared else place(arena, (*dense, layout.value_dim), self.dtype)
        coded_keys = coded_values = positions = channels = bounds = None
        if self._has_codes:
            coded_keys = place(arena, (*coded, key_codec.page_bytes), torch.uint8)
            coded_values = None if shared else place(arena, (*coded, value_codec.page_bytes), torch.uint8)
        if self.evictor is not None or layout.window is not None:
            positions = _numbers(arena, sequences, heads, size.table_pages * PAGE)
        if pruner is not None:
            channels = _numbers(arena, sequences, heads, width)
        if self.selects(index):
            bounds = place(arena, (*listed, 2, layout.key_dim), self.dtype)
        keys_at = self._file_size
        values_at = keys_at + sequences * heads * size.table_pages * key_codec.page_bytes
        self._file_size = values_at + sequences * heads * size.table_pages * value_codec.page_bytes
        return Pages(
            keys,
            values,
            _numbers(arena, *listed),
            lengths=_numbers(arena, sequences, heads),
            coded=_numbers(arena, sequences, heads),
            cold=_numbers(arena, sequences, heads),
            bounded=_numbers(arena, sequences, heads),
            dense_free=_numbers(arena, sequences, 1 + size.dense_pages),
            coded_free=_numbers(arena, sequences, 1 + size.coded_pages),
            tokens=self.tokens,
            key_codec=key_codec,
            value_codec=value_codec,
            coded_keys=coded_keys,
            coded_values=coded_values,
            positions=positions,
            channels=channels,
            bounds=bounds,
            file=self._file,
            keys_at=keys_at,
            values_at=values_at,
        )

    def selects(self, layer: int) -> bool:
        """Whether tokens that decode see only some pages of a layer."""
        selector = self.composition.selector
        return selector is not None and layer >= selector.full and self.layouts[layer].window is None

    # ---- a step ----

    def anchor_positions(self, positions: torch.Tensor) -> torch.Tensor:
        if isinstance(self.evictor, Window) and self.evictor.positions == "cache":
            return positions.clamp(max=int(self.evictor.keep) - 1)
        return positions

    def _anchors(self, layer: int) -> int:
        """How many first tokens queries always see: none where the model itself has a window."""
        return 0 if self.layouts[layer].window is not None else self.anchors

    @contextmanager
    def through(self, step: Step, ws: Workspace) -> Iterator[None]:
        """What others read of a prompt's tokens stays in scratch memory until the last of them has."""
        with ws.frame():
            for owner, last in self._last.items():
                if last != owner:
                    counts = [b - a for _, a, b in step.prefills]
                    self._shared[owner] = [self._new_shared(owner, count, ws) for count in counts]
            try:
                yield
            finally:
                self._shared = {}

    def _new_shared(self, owner: int, count: int, ws: Workspace) -> Shared:
        return Shared(self._new_run(owner, count, ws), self._received(owner, count, ws) if self.mass else None)

    def update(
        self,
        layer: int,
        step: Step,
        q_: torch.Tensor | None,
        k_: torch.Tensor | None,
        v: torch.Tensor | None,
        turn: Turn | None,
        ws: Workspace,
    ) -> Held:
        kept, anchor_q = self.layers[layer], None
        if turn is not None and q_ is not None:
            if turn.anchors is not None and self._anchors(layer):
                anchor_q = ws.empty(*q_.shape)
                ops.copy_(anchor_q, q_)
                attention.rotate_(anchor_q, *turn.anchors, turn.interleaved, ws)
            attention.rotate_(q_, *turn.tables, turn.interleaved, ws)
            if k_ is not None:
                attention.rotate_(k_, *turn.tables, turn.interleaved, ws)
        shared = self._shared.get(self.owners[layer])
        if k_ is None:
            return Held([(each.run, 0) for each in shared or ()], anchor_q)
        rows = step.vector
        if rows:
            pages.append(kept, Rows(step.places), k_[:rows], None if v is None else v[:rows])
        runs = []
        for index, (segment, a, b) in enumerate(step.prefills):
            if shared is not None:
                run, at = shared[index].run, 0
            elif self._whole is None:
                run, at = self._new_run(layer, b - a, ws), 0
            else:
                run, at = self._whole.run, segment.start - self._whole.start
                run = Run(run.keys, run.values, at + b - a)
            ops.copy_(run.keys[:, at : at + b - a], k_[a:b].transpose(0, 1))
            if v is not None:
                ops.copy_(run.values[:, at : at + b - a], v[a:b].transpose(0, 1))
            runs.append((run, at))
        return Held(runs, anchor_q)

    def attend_step(
        self, layer: int, step: Step, held: Held, q: torch.Tensor, out: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        if isinstance(self.evictor, Window):
            visible = int(self.evictor.keep) - self._anchors(layer)
            scoring = scoring._replace(window=min(visible, scoring.window or visible))
        kept, rows, heads, owner = self.layers[layer], step.vector, q.shape[1], self.owners[layer]
        shared = self._shared.get(owner)
        if rows:
            with ws.frame():
                looking = self._looking(layer, Rows(step.places), q[:rows], _part(held.anchor_q, 0, rows), ws)
                lse = ws.empty(rows, heads) if self.mass else None
                which = Rows(step.places, step.paths)
                pages.attend_rows(kept, which, looking, out[:rows], lse, ws, scoring)
                if lse is not None and step.tentative:
                    self.drafts[layer].put(which, self.tokens, looking, lse, scoring)
                    for slot in set(step.places[:rows, 0].tolist()):
                        self._drafting[slot] = True
                elif lse is not None:
                    pages.weigh_rows(kept, which, looking, lse, self.mass[layer], ws, scoring)
        for index, ((segment, a, b), (run, at)) in enumerate(zip(step.prefills, held.runs, strict=True)):
            with ws.frame():
                looking = Looking(q[a:b], _part(held.anchor_q, a, b), self._anchors(layer))
                lse = ws.empty(b - a, heads) if self.mass else None
                bf16 = self.gemm_dtype == torch.bfloat16
                pages.attend(kept, segment.slot, run, at, looking, out[a:b], lse, ws, scoring, bf16)
                if self._whole is not None:
                    self._watch(layer, segment.slot, self._whole, run, at, looking, lse, ws, scoring)
                    continue
                given = None if shared is None else shared[index].given
                if lse is not None:
                    given = self._received(layer, run.count, ws) if given is None else given
                    self._weigh(layer, segment.slot, run, at, looking, lse, given, ws, scoring)
                if layer == owner:
                    self._choose_channels(layer, segment.slot, run, looking.q)
                if layer == self._last[owner]:
                    self._settle(owner, segment.slot, run, given, ws)

    def _looking(
        self, layer: int, rows: Rows, q: torch.Tensor, anchor_q: torch.Tensor | None, ws: Workspace
    ) -> Looking:
        selector, chosen = self.composition.selector, None
        if selector is not None and self.selects(self.owners[layer]):
            chosen = ws.empty(q.shape[0], self.layouts[layer].kv_heads, selector.tokens // PAGE, dtype=torch.int32)
            pages.select(self.layers[layer], rows, q, chosen, ws)
        return Looking(q, anchor_q, self._anchors(layer), chosen)

    def _received(self, layer: int, count: int, ws: Workspace) -> torch.Tensor:
        """Zeros (kv_heads, tokens), for what the certain tokens and ``count`` others receive."""
        given = ws.empty(self.layouts[layer].kv_heads, self.sizes[layer].table_pages * PAGE + count)
        ops.zero_(given)
        return given

    def _weigh(
        self,
        layer: int,
        slot: int,
        run: Run,
        at: int,
        looking: Looking,
        lse: torch.Tensor,
        given_: torch.Tensor,
        ws: Workspace,
        scoring: Scoring,
    ) -> None:
        """Adds to ``given`` what the queries that are observed look at."""
        first = 0
        if self.observes == "last" and self.evictor is not None:
            first = max(len(looking.q) - self.evictor.window, 0)
        part = Looking(looking.q[first:], _part(looking.anchor_q, first, None), looking.anchors)
        pages.weigh(self.layers[layer], slot, run, at + first, part, lse[first:], given_, ws, scoring)

    # ---- tokens that are certain ----

    def begin(self, slot: int, start: int) -> None:
        if start and self._begun[slot] and start == int(self.tokens[slot]):
            return
        if start:
            raise ValueError(f"sequence {slot} has {int(self.tokens[slot])} tokens, and goes on at {start}")
        self._clear(slot)
        self._begun[slot] = True
        for kept in self._stores:
            for head in range(kept.table.shape[1]):  # room for what decodes without a prompt
                for page in range(-(-self._ahead // PAGE)):
                    free = kept.dense_free[slot]
                    kept.table[slot, head, page] = free[int(free[0])]
                    free[0] -= 1

    def _clear(self, slot: int) -> None:
        """Forgets a sequence."""
        self._begun[slot] = self._pruned[slot] = False
        self.tokens[slot] = 0
        for kept in self._stores:
            kept.reset(slot)
        for mass in self.mass:
            mass[slot] = 0.0
        for memory in self.memory:
            memory[slot] = math.nan

    def prefilled(self, slot: int, start: int, stop: int) -> None:
        self.tokens[slot] = stop
        self._pruned[slot] = True

    def room(self, slot: int) -> int:
        return min(BLOCK - int(self.tokens[slot]) % BLOCK, self.tail)

    def reusable(self, slot: int, common: int) -> int:
        return common if common == int(self.tokens[slot]) else 0

    # ---- what is kept of prompts ----

    def largest_entry(self, chunk: int) -> int:
        in_file = self._file_size if self._file >= 0 else 0
        return -(-(self._nbytes + in_file) // self.sequences)

    def entry_nbytes(self, slot: int, start: int, stop: int) -> int:
        return sum(part.nbytes for part in self._parts(slot)) if int(self.tokens[slot]) == stop else 0

    def save(self, slot: int, start: int, stop: int, put: Move) -> None:
        for part in self._parts(slot):
            if isinstance(part, InFile):
                page = bytearray(part.nbytes)
                os.preadv(self._file, [page], part.at)
                put(torch.frombuffer(page, dtype=torch.uint8))
            else:
                put(part)

    def restore(self, slot: int, start: int, stop: int, get: Move) -> None:
        self._clear(slot)
        for part in self._parts(slot):
            if isinstance(part, InFile):
                page = bytearray(part.nbytes)
                get(torch.frombuffer(page, dtype=torch.uint8))
                os.pwritev(self._file, [page], part.at)
            else:
                get(part)
        self.tokens[slot] = stop
        self._begun[slot] = self._pruned[slot] = True

    def _parts(self, slot: int) -> Iterator[torch.Tensor | InFile]:
        """All that is kept of a sequence, as flat uint8 tensors and pages in the file. What comes later follows from
        what came before, so that the same walk fills a sequence that is restored."""
        for layer in self.own:
            kept = self.layers[layer]
            for numbers in (kept.lengths, kept.coded, kept.cold, kept.bounded, kept.dense_free, kept.coded_free):
                yield as_bytes(numbers[slot])
            yield as_bytes(kept.table[slot])
            if kept.channels is not None:
                yield as_bytes(kept.channels[slot])
            if self.memory:
                yield as_bytes(self.memory[layer][slot])
            for head, length in enumerate(kept.lengths[slot].tolist()):
                if kept.positions is not None:  # those of the next tokens are there too
                    yield as_bytes(kept.positions[slot, head, : length + self._ahead])
                if self.mass:
                    yield as_bytes(self.mass[layer][slot, head, :length])
                if kept.bounds is not None:
                    yield as_bytes(kept.bounds[slot, head, : int(kept.bounded[slot, head])])
                yield from self._pages_of(kept, slot, head, -(-length // PAGE))

    @staticmethod
    def _pages_of(kept: Pages, slot: int, head: int, count: int) -> Iterator[torch.Tensor | InFile]:
        """Keys and values of a head's first ``count`` pages."""
        cold, coded = int(kept.cold[slot, head]), int(kept.coded[slot, head])
        for j, number in enumerate(kept.table[slot, head, :count].tolist()):
            if j < cold:
                yield from (InFile(*where) for where in kept.file_places(slot, head, j))
                continue
            keys: torch.Tensor = kept.keys
            values: torch.Tensor | None = kept.values
            if kept.coded_keys is not None and j < coded:
                keys, values = kept.coded_keys, kept.coded_values
            yield as_bytes(keys[slot, number])
            if values is not None and not kept.shared:
                yield as_bytes(values[slot, number])

    def commit(self, slot: int, path: Sequence[int], ws: Workspace) -> None:
        if self.drafts and self._drafting[slot]:
            self._commit_drafts(slot, path, ws)
        elif list(path) != list(range(len(path))):
            for kept in self._stores:
                pages.straighten(kept, slot, torch.tensor(path, dtype=torch.int32))
        torch._foreach_add_([kept.lengths[slot] for kept in self._stores], len(path))
        self.tokens[slot] += len(path)
        if int(self.tokens[slot]) % BLOCK == 0 and path:
            for layer in self.own:
                with ws.frame():
                    given = self._received(layer, 0, ws) if self.mass else None
                    self._settle(layer, slot, self._new_run(layer, 0, ws), given, ws)

    @contextmanager
    def whole(self, layer: int, segment: Any, ws: Workspace) -> Iterator[None]:
        if self.own != list(range(len(self.owners))):
            raise UsageError(
                "layers that share keys and values with methods that let go of some are computed chunk by chunk",
                "Leave --prefill layered out, or kvsharer.",
            )
        layout, count, evictor = self.layouts[layer], len(segment.tokens), self.evictor
        wanted = evictor.window if evictor is not None and self.observes == "last" else 0
        if self.composition.pruner is not None:
            wanted = max(wanted, self.composition.pruner.window)
        last = min(wanted, count)
        with ws.frame():
            run = self._new_run(layer, count, ws)
            q, anchor_q = ws.empty(2, last, layout.heads, layout.key_dim)
            given = self._received(layer, count, ws) if self.mass else None
            whole = Whole(run, segment.start, last, q, anchor_q, ws.empty(last, layout.heads), given)
            self._whole = whole
            try:
                yield
            finally:
                self._whole = None
            self._choose_channels(layer, segment.slot, run, whole.q)
            self._settle(layer, segment.slot, run, given, ws)

    def _watch(
        self,
        layer: int,
        slot: int,
        whole: Whole,
        run: Run,
        at: int,
        looking: Looking,
        lse: torch.Tensor | None,
        ws: Workspace,
        scoring: Scoring,
    ) -> None:
        """Keeps what is wanted of the queries of a chunk of a whole prompt; all of them are weighed chunk by chunk, the
        last ones when they are there."""
        count, total = len(looking.q), whole.run.count
        first = max(total - whole.last - at, 0)  # of this chunk's, the first that is among the last of all
        if first < count:
            to = at + first - (total - whole.last)
            rows = slice(to, to + count - first)
            ops.copy_(whole.q[rows], looking.q[first:])
            if looking.anchor_q is not None:
                ops.copy_(whole.anchor_q[rows], looking.anchor_q[first:])
            if lse is not None:
                ops.copy_(whole.lse[rows], lse[first:])
        if whole.given is None or lse is None:
            return
        if self.observes == "all":
            pages.weigh(self.layers[layer], slot, run, at, looking, lse, whole.given, ws, scoring)
        elif at + count == total:
            turned = None if looking.anchor_q is None else whole.anchor_q
            last = Looking(whole.q, turned, looking.anchors)
            self._weigh(layer, slot, run, total - whole.last, last, whole.lse, whole.given, ws, scoring)

    def _choose_channels(self, layer: int, slot: int, run: Run, q: torch.Tensor) -> None:
        """The first queries ``q`` (n, heads, key_dim) of a sequence decide which channels of keys stay."""
        pruner, channels = self.composition.pruner, self.layers[layer].channels
        if pruner is not None and channels is not None and not ops.is_dry() and not self._pruned[slot]:
            channels[slot] = pruner.choose(q, run.keys[:, : run.count])

    def _settle(self, layer: int, slot: int, run: Run, given: torch.Tensor | None, ws: Workspace) -> None:
        """The tokens of ``run`` are certain: what is too much is let go, and what stays is written."""
        kept, evictor = self.layers[layer], self.evictor
        heads, tier = self.layouts[layer].kv_heads, self.composition.tier
        resident = pages.EVERYTHING if tier is None else tier.resident // PAGE

        def keep(run: Run, indices: torch.Tensor | None = None, held: torch.Tensor | None = None) -> None:
            try:
                pages.keep(kept, slot, run, ws, indices, held, self.composition.recent, resident, self._ahead)
            except RuntimeError as error:
                if tier is None:
                    raise
                hint = "Make room on it, or name a folder on another: host(folder=...)."
                raise TightfitError(str(error), hint) from error

        if kept.positions is None or ops.is_dry():
            if kept.positions is not None:
                ws.empty(heads, kept.positions.shape[2] + run.count, dtype=torch.int32)
            if self.merger is not None:
                self._merge_most(layer, slot, run, self.merger, ws)
            keep(run)
            return
        before = kept.lengths[slot].tolist()
        counts = [length + run.count for length in before]
        tokens = int(self.tokens[slot]) + run.count
        limit = self._limit(layer, tokens)
        positions = ws.empty(heads, kept.positions.shape[2] + run.count, dtype=torch.int32)
        for head, length in enumerate(before):
            positions[head, :length] = kept.positions[slot, head, :length]
            positions[head, length : length + run.count] = torch.arange(tokens - run.count, tokens)
            if given is not None and self._remembers(run.count):
                given[head, :length] += self.mass[layer][slot, head, :length]
        ragged = evictor is not None and evictor.budget == "adakv"
        window = self.layouts[layer].window
        # The next query stands at `tokens`, and sees itself too.
        oldest = min((int(positions[head, 0]) for head in range(heads) if counts[head]), default=tokens)
        too_old = window is not None and oldest <= tokens - window
        if too_old or (sum(counts) > limit * heads if ragged else max(counts) > limit):
            indices, left = self._judge(layer, given, positions, counts, tokens, limit)
            listed = indices
            if self.merger is not None:
                horizon = -1 if window is None else tokens - window  # what no query sees any more is not merged
                listed = self._merge(layer, slot, run, self.merger, (indices, left), positions > horizon, ws)
                run = Run(run.keys, run.values, run.keys.shape[1])
            counts = left
            keep(run, listed, torch.tensor(counts, dtype=torch.int32))
            gather = indices.long().clamp(max=positions.shape[1] - 1)
            positions[:, : indices.shape[1]] = positions.gather(1, gather)
            if given is not None:
                given[:, : indices.shape[1]] = given.gather(1, gather)
        else:
            keep(run)
        ahead = torch.arange(tokens, tokens + self._ahead)
        for head, length in enumerate(counts):
            kept.positions[slot, head, :length] = positions[head, :length]
            kept.positions[slot, head, length : length + len(ahead)] = ahead  # where the next tokens will be
            if given is not None:
                mass = self.mass[layer][slot, head]
                mass[:] = 0.0
                if self.observes == "all" or run.count:  # else the last queries were judged, and others come
                    mass[:length] = given[head, :length]

    def rehearse(self, count: int) -> None:
        for layer, layout in enumerate(self.layouts):
            kept = self.layers[layer].positions
            if kept is None:
                continue
            width = kept.shape[2] + count
            given = torch.zeros(layout.kv_heads, width)
            positions = torch.arange(width, dtype=torch.int32).repeat(layout.kv_heads, 1)
            limit = self._limit(layer, width)
            self._judge(layer, given, positions, [width] * layout.kv_heads, width, limit)

    def _merge(
        self,
        layer: int,
        slot: int,
        run: Run,
        merger: Merger,
        staying: tuple[torch.Tensor, list[int]],
        seen: torch.Tensor,
        ws: Workspace,
    ) -> torch.Tensor:
        """Merges tokens that are let go of, and ``seen`` (kv_heads, n) bool by queries to come, into those that stay:
        indices (kv_heads, m) int32 and how many for each head. What changes by that lies in the run, behind its own
        tokens; gives the indices by which it is found there."""
        kept, indices = self.layers[layer], staying[0].clone()
        for head, count in enumerate(staying[1]):
            total = int(kept.lengths[slot, head]) + run.count
            places = indices[head, :count].long()
            leaves = seen[head, :total].clone()
            leaves[places] = False
            if not leaves.any():
                continue
            with ws.frame():
                leaving = leaves.nonzero()[:, 0]
                tokens, changed = self._merge_head(layer, slot, head, run, merger, places, leaving, ws)
                which = changed.nonzero()[:, 0]
                behind = slice(run.count, run.count + len(which))
                for of_run, merged in zip((run.keys, run.values), tokens, strict=True):
                    if merged is not None:
                        of_run[head, behind] = merged[which].to(self.dtype)
                indices[head, which] = torch.arange(total, total + len(which), dtype=torch.int32)
        return indices

    def _merge_most(self, layer: int, slot: int, run: Run, merger: Merger, ws: Workspace) -> None:
        """Takes the scratch of merging as many tokens into as many others as can be."""
        most = self.sizes[layer].table_pages * PAGE
        with ws.frame():
            self._merge_head(layer, slot, 0, run, merger, torch.arange(most), torch.arange(most + run.count), ws)

    def _merge_head(
        self,
        layer: int,
        slot: int,
        head: int,
        run: Run,
        merger: Merger,
        places: torch.Tensor,
        leaving: torch.Tensor,
        ws: Workspace,
    ) -> tuple[Tokens, torch.Tensor]:
        """The tokens at ``places`` (m,) int64 of a head, ascending, after those at ``leaving`` (n,) were merged into
        them, and which of them were changed."""
        kept, layout = self.layers[layer], self.layouts[layer]
        values = None if layout.shared else ws.empty(len(places), layout.value_dim)
        staying, at = Tokens(ws.empty(len(places), layout.key_dim), values), 0
        for block in TokensAt(kept, slot, head, run, places, ws).blocks():
            for whole, part in zip(staying, block, strict=True):
                if whole is not None and part is not None:
                    ops.copy_(whole[at : at + len(part)], part)
            at += len(block.keys)
        changed = merger.merge(
            staying, TokensAt(kept, slot, head, run, leaving, ws), self.memory[layer][slot, head], ws
        )
        return staying, changed

    def _new_run(self, layer: int, count: int, ws: Workspace) -> Run:
        """Room in scratch memory for the keys and values of ``count`` tokens, and of those that merging changes."""
        layout = self.layouts[layer]
        slots = max(count, 1) + (0 if self.merger is None else self.sizes[layer].table_pages * PAGE)
        keys = ws.empty(layout.kv_heads, slots, layout.key_dim, dtype=self.dtype)
        if layout.shared:
            return Run(keys, keys[..., : layout.value_dim], count)
        return Run(keys, ws.empty(layout.kv_heads, slots, layout.value_dim, dtype=self.dtype), count)

    def _remembers(self, count: int) -> bool:
        """Whether tokens keep what they received before: where all queries count, and where a chunk has fewer than are
        observed."""
        return self.observes == "all" or (self.evictor is not None and 0 <= count < self.evictor.window)

    def _judge(
        self,
        layer: int,
        given: torch.Tensor | None,
        positions: torch.Tensor,
        counts: list[int],
        tokens: int,
        limit: int,
    ) -> tuple[torch.Tensor, list[int]]:
        """Which of a layer's tokens stay: indices (kv_heads, n) int32, ascending, and how many for each head."""
        evictor, window = self.evictor, self.layouts[layer].window
        width = max(counts)
        positions = positions[:, :width]
        if evictor is None:
            scores = positions.float()
        else:
            mass = torch.zeros(positions.shape) if given is None else given[:, :width].clone()
            scores = evictor.scores(Seen(mass, positions, counts, tokens))
            first, last = evictor.protected(limit)
            if window is not None:  # which hides the first tokens sooner or later
                first, last = 0, first + last
            for head, count in enumerate(counts):
                scores[head, : min(first, count)] = torch.inf
                scores[head, max(count - last, 0) : count] = torch.inf
        if window is not None:
            scores = scores.masked_fill(positions <= tokens - window, -torch.inf)
        indices, kept = budgets.choose(scores, counts, limit, "uniform" if evictor is None else evictor.budget)
        return indices, kept.tolist()

    def _commit_drafts(self, slot: int, path: Sequence[int], ws: Workspace) -> None:
        """The tentative tokens of ``path`` become the first ones, and what they looked at is noted."""
        self._drafting[slot] = False
        order = torch.tensor(path, dtype=torch.int32)
        start = int(self.tokens[slot])
        places = torch.tensor([(slot, start + index) for index in range(len(path))], dtype=torch.int32).view(-1, 2)
        for layer, kept in enumerate(self.layers):
            if layer == self.owners[layer]:
                pages.straighten(kept, slot, order)
        if not path:
            return
        # Where layers share what tokens received, it is summed up in the order in which they decode: token by token.
        shared = len(set(self.owners)) < len(self.owners)
        for part in torch.arange(len(path)).split(1 if shared else len(path)):
            for layer, (kept, drafts) in enumerate(zip(self.layers, self.drafts, strict=True)):
                with ws.frame():
                    rows, which = Rows(places[part]), order[part]
                    looking = self._looking(layer, rows, drafts.q[slot, which], drafts.turned(slot, which), ws)
                    lse, scoring = drafts.lse[slot, which], drafts.scoring
                    pages.weigh_rows(kept, rows, looking, lse, self.mass[layer], ws, scoring)


def _numbers(arena: Arena, *shape: int) -> torch.Tensor:
    return place(arena, shape, torch.int32)


def _part(x: torch.Tensor | None, start: int, stop: int | None) -> torch.Tensor | None:
    return None if x is None else x[start:stop]
