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
from functools import partial
from typing import Any, TypeVar

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.errors import UsageError
from tightfit.kernels import ops, pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import PAGE, Counts, Looking, Pages, Rows, Run
from tightfit.kv.base import BLOCK, BaseCache, LayerLayout, Move, SegmentLike, Step, Turn, Turned, before, check_alone
from tightfit.kv.beside import Beside
from tightfit.kv.cache import as_bytes, numbers, place
from tightfit.kv.compose import Composition
from tightfit.kv.entries import InFile, parts
from tightfit.kv.evict.window import Window
from tightfit.kv.fitted import NOTHING, Known
from tightfit.kv.lower import LowerStore
from tightfit.kv.merge.merging import Merging
from tightfit.kv.method import Merger, Rater, Streamer, Structured, Tabled
from tightfit.kv.observed import Observed, Observer
from tightfit.kv.pooled import Pooled
from tightfit.kv.rated import Rated
from tightfit.kv.reading import Encode, Reading
from tightfit.kv.reserved import Reserved
from tightfit.kv.rest import Resting
from tightfit.kv.select.selecting import Selecting, Where
from tightfit.kv.settling import Settling
from tightfit.kv.share.distant import Distant
from tightfit.kv.streaming import Streaming
from tightfit.kv.turning import Turning, stand

Made = TypeVar("Made")


@dataclass
class Held:
    """A step's tokens of one layer on their way through attention: the run of each prefill segment and the place of its
    first token there, the queries that look at anchors, and what the tokens are worth (n, kv_heads)."""

    runs: list[tuple[Run, int]]
    anchor_q: torch.Tensor | None
    worth: torch.Tensor | None = None


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
        known: Known = NOTHING,
    ) -> None:
        composition.check(layouts)
        composition = composition.with_found(known, lambda found: _placed(found, arena))
        self.layouts = layouts
        self.owners = list(range(len(layouts)) if known.owners is None else known.owners)
        self.composition = composition
        self.context = context
        self.sequences = sequences
        self.dtype = dtype
        self.gemm_dtype = gemm_dtype
        self.tail = tail
        self.evictor = evictor = composition.evictor
        streamer = composition.streamer
        streams = None if streamer is None else streamer.streams(layouts, known)
        self.anchors = 0 if evictor is None else evictor.anchors
        if self.own != list(range(len(layouts))):
            _check_alone(composition)
        self.reserved = reserved = Reserved(layouts, composition, context, sequences, tail, known, streams)
        self._file = -1 if composition.tier is None else composition.tier.open()
        self.staging: list[pages.Staging] = []
        self._closing = weakref.finalize(self, _close, self._file, self.staging)
        prepared = []
        if isinstance(evictor, Rater):
            tensors = known.of(evictor)
            prepared = self._of_owners(lambda layer: evictor.prepare(layer, tensors, arena))
        before = arena.used  # from here on it is of sequences
        self.tokens = numbers(arena, sequences)
        self.layers = self._of_owners(lambda layer: reserved.pages(layer, arena, dtype, self.tokens, self._file))
        selected = [reserved.selects(layer) for layer in self.own]
        if composition.tier is not None:
            self.staging += composition.tier.stage(self._stores, selected, arena)
        self.reading = (
            None if composition.reads is None else Reading(composition.reads, context, sequences, tail, arena)
        )
        self.turning: list[Turning] = []
        if isinstance(evictor, Structured) and evictor.reuses:
            self.turning = self._of_owners(self._turning)
        self.merging: list[Merging] = []
        if isinstance(evictor, Merger):
            self.merging = self._of_owners(lambda layer: self._merging(evictor, layer, arena))
        self.selecting: list[Selecting | None] = self._of_owners(lambda layer: self._selecting(layer, arena, known))
        self.prompts = numbers(arena, sequences)  # how many tokens were of the prompt, or before it
        widths = [size.table_pages * PAGE for size in reserved.sizes]
        self.observed: Observed | None = None  # by what tokens are judged
        self.rated: Rated | None = None  # the same, where they bring it with them
        if isinstance(evictor, Rater):
            common = layouts, widths, self._of_owners, sequences
            self.observed = self.rated = Rated(evictor, prepared, *common, gemm_dtype, arena)
        elif evictor is not None and evictor.observes != "nothing":
            self.observed = Observed(evictor, layouts, widths, self._of_owners, sequences, tail, arena)
        self.watching: Observer | None = self.observed  # what looks at prompts
        if streamer is not None and streamer.window:
            self.watching = Observer(streamer, layouts, widths, -(-streamer.window // BLOCK))
        self.distant = reserved.distant(self.layers, arena, dtype, self.tokens, self._file, known)
        self.beside = self._of_owners(lambda layer: self._beside(layer, arena, known))
        self.repeatable = all(each.repeats for found in self.beside for each in found)
        # After which layer the tokens of each owner may leave: the last one that reads them, or needs them there.
        after = list(range(len(layouts))) if self.distant is None else self.distant.settled_after(len(layouts))
        self._last = {owner: after[layer] for layer, owner in enumerate(self.owners)}
        self.pooled: dict[int, Pooled] = {}  # of each layer that shares what it keeps with others
        for layer in self.own:
            if reserved.pooled(layer) and layer not in self.pooled:
                layers = reserved.common(layer)
                self.pooled |= dict.fromkeys(layers, self._pooling(layers, arena))
        self.settling = Settling(
            composition,
            reserved,
            layouts,
            self.owners,
            context,
            dtype,
            self.tokens,
            self.prompts,
            self.layers,
            self.beside,
            self.selecting,
            self.merging,
            self.turning,
            self.pooled,
            self.observed,
            self.reading,
        )
        self.streaming: Streaming | None = None
        if streamer is not None:
            self.streaming = self.settling.streaming = Streaming(
                streamer, self.layers, self.beside, self.settling.keep, streams
            )
            self.streaming.find(reserved, sequences, arena)
        self._nbytes = arena.used - before
        self._keep_centroids(known)
        self._begun = [False] * sequences
        self._drafting = [False] * sequences
        self._pruned = [False] * sequences
        self._whole: Whole | None = None
        self._shared: dict[int, list[Shared]] = {}  # of each owner that others read, for each prefill of a step

    @property
    def _stores(self) -> list[Pages]:
        return [self.layers[layer] for layer in self.own]

    @property
    def lower(self) -> list[LowerStore | None]:
        """The lower store of each layer that has one."""
        return [next((each for each in found if isinstance(each, LowerStore)), None) for found in self.beside]

    def _of_owners(self, make: Callable[[int], Made]) -> list[Made]:
        """Of each layer what is made for its owner."""
        made = {layer: make(layer) for layer in self.own}
        return [made[owner] for owner in self.owners]

    def _merging(self, merger: Merger, layer: int, arena: Arena) -> Merging:
        memory = place(arena, (self.sequences, self.layouts[layer].kv_heads, merger.remembers), torch.float32)
        return Merging(merger, layer, self.layers[layer], memory, self.reserved.sizes[layer].table_pages * PAGE)

    def _pooling(self, layers: Sequence[int], arena: Arena) -> Pooled:
        first = layers[0]
        return Pooled(layers, self.sequences, self.layouts[first].kv_heads, self.reserved.sizes[first].most, arena)

    def _turning(self, layer: int) -> Turning:
        rotation = self.layouts[layer].rotation
        assert rotation is not None
        return Turning(self.layers[layer], rotation, self.reserved.sizes[layer].table_pages * PAGE)

    def _beside(self, layer: int, arena: Arena, known: Known) -> list[Beside]:
        """What queries of a layer see beside its pages."""
        found: list[Beside] = []
        lower = self.reserved.lower(layer, arena, self.dtype, self.tokens, self._file, known)
        rest = self.composition.rest
        if lower is not None:
            found.append(lower)
        if self.distant is not None:
            found.append(Distant(self.distant, layer))
        if rest is not None:
            found.append(Resting(rest, layer, self.layouts[layer], self.sequences, arena))
        return found

    def _selecting(self, layer: int, arena: Arena, known: Known) -> Selecting | None:
        selector = self.reserved.of_layers[layer].selector
        if selector is None or not self.reserved.selects(layer):
            return None
        most = self.reserved.sizes[layer].table_pages * PAGE
        names = None if self.reading is None else self.reading.names
        of_layer = layer, self.layers[layer], self.layouts[layer], self.sequences, most, self.tail, arena
        return selector.select(Where(*of_layer, known.tensors.get(selector.name), names))

    @property
    def _selections(self) -> list[Selecting]:
        return [found for layer in self.own if (found := self.selecting[layer]) is not None]

    def _keep_centroids(self, known: Known) -> None:
        """Copies what was fitted into the tables of codecs."""
        for method, of_keys in ((self.composition.key_codec, True), (self.composition.value_codec, False)):
            if method is None or method.name not in known.tensors:
                continue
            for layer in self.own:
                kept = self.layers[layer]
                side, name = (kept.key_side, "keys") if of_keys else (kept.value_side, "values")
                if side is not None:
                    side[0] = known.of(method)[f"{name}.{layer}"].flatten(1)

    def close(self) -> None:
        self._closing()

    def chosen(self, layer: int, slot: int = 0) -> list[tuple[int, float]]:
        """Of each head, among how many tokens the next one chooses, and how many of them it reads on average."""
        selector, selecting = self.reserved.of_layers[layer].selector, self.selecting[layer]
        if selector is None or selecting is None:
            return [(0, 0.0)] * self.layouts[layer].kv_heads
        return [(among, selector.reads(among)) for among in selecting.among(slot)]

    @property
    def fetched(self) -> Counts:
        """What was brought from the file so far by a tier that reads ahead, of all layers."""
        counts = [Counts(0, 0, 0, 0), *(each.counts for each in self.staging)]
        return Counts(*(sum(numbers) for numbers in zip(*counts, strict=True)))

    # ---- what tokens there are ----

    @property
    def reads(self) -> bool:
        return self.reading is not None

    def resolve(self, encode: Encode) -> None:
        if self.reading is not None:
            self.reading.resolve(encode)

    def told(self, slot: int, start: int, tokens: Sequence[int]) -> None:
        if self.reading is not None:
            self.reading.told(slot, start, tokens)

    def standing(self, step: Step, positions: torch.Tensor) -> torch.Tensor:
        if not self.turning or self.reading is None or not isinstance(self.evictor, Structured):
            return positions
        return stand(self.layers[0], self.reading, self.evictor, partial(self.reserved.limit, 0), step, positions)

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
            counts = [b - a for _, a, b in step.prefills]
            for owner, last in self._last.items():
                if last != owner or self.owners.count(owner) > 1:
                    self._shared[owner] = [self._new_shared(owner, count, ws) for count in counts]
            if self.distant is not None:
                self.distant.begin(step, ws)
            try:
                yield
            finally:
                self._shared = {}
                if self.distant is not None:
                    self.distant.runs = {}

    def _new_shared(self, owner: int, count: int, ws: Workspace) -> Shared:
        run = self.settling.new_run(owner, count, ws)
        if owner in self.awaited:
            ops.zero_(run.keys)
            ops.zero_(run.values)
        return Shared(run, self._received(owner, count, ws))

    def update(
        self,
        layer: int,
        step: Step,
        q_: torch.Tensor | None,
        k_: torch.Tensor | None,
        v: torch.Tensor | None,
        turn: Turn | Turned | None,
        ws: Workspace,
    ) -> Held:
        kept, anchor_q, worth = self.layers[layer], None, None
        if self.rated is not None and q_ is not None and k_ is not None and v is not None:
            worth = self.rated.rate(layer, step, q_, k_, v, ws)
        if turn is not None and q_ is not None:
            anchor_q = turn.apply(q_, k_, self._anchors(layer) > 0, ws)
        shared = self._shared.get(self.owners[layer])
        if k_ is None:
            return Held([(each.run, 0) for each in shared or ()], anchor_q)
        rows = step.vector
        if rows:
            pages.append(kept, Rows(step.places), k_[:rows], None if v is None else v[:rows])
            if self.rated is not None and worth is not None:
                self.rated.put(layer, kept, Rows(step.places), worth[:rows])
        runs = []
        for index, (segment, a, b) in enumerate(step.prefills):
            if shared is not None:
                run, at = shared[index].run, 0
            elif self._whole is None:
                run, at = self.settling.new_run(layer, b - a, ws), 0
            else:
                run, at = self._whole.run, segment.start - self._whole.start
                run = Run(run.keys, run.values, at + b - a)
            ops.copy_(run.keys[:, at : at + b - a], k_[a:b].transpose(0, 1))
            if v is not None:
                ops.copy_(run.values[:, at : at + b - a], v[a:b].transpose(0, 1))
            runs.append((run, at))
        return Held(runs, anchor_q, worth)

    def attend_step(
        self, layer: int, step: Step, held: Held, q: torch.Tensor, out: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        if isinstance(self.evictor, Window):
            visible = int(self.evictor.keep) - self._anchors(layer)
            scoring = scoring._replace(window=min(visible, scoring.window or visible))
        kept, rows, past = self.layers[layer], step.vector, self.layouts[layer].past
        observed = None if self.rated is not None else self.observed
        beside, selecting = self.beside[layer], self.selecting[layer]
        sums = observed is not None or bool(beside) or (selecting is not None and selecting.joins)
        if rows:
            if past:
                check_alone(step)
            with ws.frame():
                which = Rows(step.places, step.paths)
                looking = self._looking(layer, which, q[:rows], _part(held.anchor_q, 0, rows), ws, scoring)
                lse = ws.empty(rows, q.shape[1]) if sums else None
                seen = scoring
                if past:
                    looking, seen = looking._replace(certain=True), before(scoring)
                pages.attend_rows(kept, which, looking, out[:rows], lse, ws, seen)
                if selecting is not None and lse is not None:
                    selecting.join_rows(which, looking, out[:rows], lse, ws, scoring)
                if lse is not None:
                    for each in beside:
                        each.join_rows(which, q[:rows], out[:rows], lse, ws, scoring)
                if observed is not None and lse is not None and step.tentative:
                    observed.drafts[layer].put(which, self.tokens, looking, lse, scoring)
                    for slot in set(step.places[:rows, 0].tolist()):
                        self._drafting[slot] = True
                elif observed is not None and lse is not None:
                    observed.rows(layer, kept, which, looking, lse, ws, scoring)
        for index, ((segment, a, b), (run, at)) in enumerate(zip(step.prefills, held.runs, strict=True)):
            if self.reading is None:
                self._attend_prompt(layer, segment, (a, b), run, at, held, q, out, index, ws, scoring)
                continue
            if ops.is_dry():  # a stretch may be the whole chunk
                with ws.frame():
                    part = self._part(layer, run, 0, b - a, ws)
                    self._attend_prompt(layer, segment, (a, b), part, 0, held, q, out, index, ws, scoring)
                continue
            for first, stop in self.reading.stretches(segment.slot, segment.start, b - a):
                self.tokens[segment.slot] = segment.start + first
                stretch = a + first, a + stop
                with ws.frame():
                    part = self._part(layer, run, first, stop, ws)
                    self._attend_prompt(layer, segment, stretch, part, 0, held, q, out, index, ws, scoring)
            self.tokens[segment.slot] = segment.start

    def _part(self, layer: int, run: Run, start: int, stop: int, ws: Workspace) -> Run:
        """Some tokens of a run, with room behind them where some may be turned."""
        if not self.turning:
            return run.part(start, stop)
        part = self.settling.new_run(layer, stop - start, ws)
        ops.copy_(part.keys[:, : stop - start], run.keys[:, start:stop])
        ops.copy_(part.values[:, : stop - start], run.values[:, start:stop])
        return part

    def _attend_prompt(
        self,
        layer: int,
        segment: SegmentLike,
        rows: tuple[int, int],
        run: Run,
        at: int,
        held: Held,
        q: torch.Tensor,
        out: torch.Tensor,
        index: int,
        ws: Workspace,
        scoring: Scoring,
    ) -> None:
        """Attention of ``rows`` of the step's prompt ``index``, which are the tokens from ``at`` on of a run; what the
        run adds is certain then, unless others read it or more of the prompt comes first."""
        kept, owner, beside = self.layers[layer], self.owners[layer], self.beside[layer]
        watching = None if self.rated is not None else self.watching
        (a, b), slot, past = rows, segment.slot, self.layouts[layer].past
        with ws.frame():
            looking = Looking(q[a:b], _part(held.anchor_q, a, b), self._anchors(layer))
            lse = ws.empty(b - a, q.shape[1]) if watching is not None or beside else None
            bf16 = self.gemm_dtype == torch.bfloat16
            if past:
                self._attend_before(layer, segment, run, looking, out[a:b], ws, scoring, bf16)
            else:
                pages.attend(kept, slot, run, at, looking, out[a:b], lse, ws, scoring, bf16)
            if lse is not None:
                for each in beside:
                    each.join(slot, q[a:b], out[a:b], lse, ws, scoring, bf16)
            if self.distant is not None:
                self.distant.runs.setdefault(slot, {})[layer] = run
            common = self._shared.get(owner)
            held_by: Whole | Shared | None = self._whole or (None if common is None else common[index])
            given = self._received(layer, run.count, ws) if held_by is None else held_by.given
            if self.rated is not None and held.worth is not None and given is not None:
                self.rated.put_chunk(kept, slot, at, held.worth[a:b], given)
            if self._whole is not None:
                self._watch(layer, slot, self._whole, run, at, looking, lse, ws, scoring)
                return
            if watching is not None and lse is not None and given is not None:
                watching.chunk(kept, slot, run, at, looking, lse, given, ws, scoring)
            if layer == owner and self.settled:
                self._look_first(layer, slot, run, looking.q)
            if self.settled:
                whole = segment.stop >= (segment.length or 0)
                for waiting in (each for each in self.own if self._last[each] == layer):
                    if waiting == owner:
                        self.settling.settle(owner, slot, run, given, ws, whole)
                    else:
                        of_layer = self._shared[waiting][index]
                        self.settling.settle(waiting, slot, of_layer.run, of_layer.given, ws, whole)

    def _attend_before(
        self,
        layer: int,
        segment: SegmentLike,
        run: Run,
        looking: Looking,
        out: torch.Tensor,
        ws: Workspace,
        scoring: Scoring,
        bf16: bool,
    ) -> None:
        """Attention of a prompt's chunk whose tokens see those before their own: the first one what is certain."""
        kept, slot = self.layers[layer], segment.slot
        first, others = (
            Looking(looking.q[rows], None if looking.anchor_q is None else looking.anchor_q[rows], looking.anchors)
            for rows in (slice(0, 1), slice(1, None))
        )
        if segment.start == 0:
            ops.zero_(out[:1])
        else:
            pages.attend(kept, slot, run, 0, first._replace(certain=True), out[:1], None, ws, scoring, bf16)
        if len(out) > 1:
            pages.attend(kept, slot, run, 0, others, out[1:], None, ws, before(scoring), bf16)

    def _looking(
        self,
        layer: int,
        rows: Rows,
        q: torch.Tensor,
        anchor_q: torch.Tensor | None,
        ws: Workspace,
        scoring: Scoring,
    ) -> Looking:
        looking, selecting = Looking(q, anchor_q, self._anchors(layer)), self.selecting[layer]
        return looking if selecting is None else selecting.look(rows, looking, ws, scoring)

    def _received(self, layer: int, count: int, ws: Workspace) -> torch.Tensor | None:
        return None if self.watching is None else self.watching.room(layer, count, ws)

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
                for page in range(-(-self.reserved.ahead // PAGE)):
                    free = kept.dense_free[slot]
                    kept.table[slot, head, page] = free[int(free[0])]
                    free[0] -= 1

    def _clear(self, slot: int) -> None:
        """Forgets a sequence."""
        self._begun[slot] = self._pruned[slot] = False
        self.tokens[slot] = 0
        for layer in self.own:
            self.layers[layer].reset(slot)
            for each in self.beside[layer]:
                each.clear(slot)
        self.prompts[slot] = 0
        if self.observed is not None:
            self.observed.clear(slot)
        for pooled in self.pooled.values():
            pooled.clear(slot)
        if self.streaming is not None:
            self.streaming.clear(slot)
        for merging in self.merging:
            merging.memory[slot] = math.nan
        for selecting in self._selections:
            selecting.reset(slot)

    def prefilled(self, slot: int, start: int, stop: int) -> None:
        self.tokens[slot] = self.prompts[slot] = stop
        self._pruned[slot] = True
        if self.observed is not None:
            self.observed.advance(slot, stop, stop - start)

    def room(self, slot: int) -> int:
        if self.reads or any(layout.past for layout in self.layouts):
            return 1
        return min(BLOCK - int(self.tokens[slot]) % BLOCK, self.tail)

    def reusable(self, slot: int, common: int) -> int:
        return common if common == int(self.tokens[slot]) else 0

    # ---- what is kept of prompts ----

    def largest_entry(self, chunk: int) -> int:
        in_file = self.reserved.file_bytes if self._file >= 0 else 0
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

    def _parts(self, slot: int) -> Iterator[torch.Tensor | InFile]:
        yield as_bytes(self.prompts[slot : slot + 1])
        if self.reading is not None:
            yield as_bytes(self.reading.ids[slot])
        if self.observed is not None:
            yield as_bytes(self.observed.since[slot])
        for pool in self.reserved.pools.values():
            yield as_bytes(pool.dense_free[slot])
            yield as_bytes(pool.coded_free[slot])
        for pooled in dict.fromkeys(self.pooled.values()):
            yield from pooled.parts(slot)
        if self.streaming is not None:
            yield from self.streaming.parts(slot)
        for layer in self.own:
            mass = None if self.observed is None else self.observed.mass[layer]
            states = [self.merging[layer].memory] if self.merging else []
            yield from parts(self.layers[layer], slot, self.reserved.ahead, mass, states)
            for each in self.beside[layer]:
                yield from each.parts(slot)
            selecting = self.selecting[layer]
            if selecting is not None:
                yield from selecting.parts(slot)

    def restore(self, slot: int, start: int, stop: int, get: Move) -> None:
        self._clear(slot)
        for part in self._parts(slot):
            if isinstance(part, InFile):
                page = bytearray(part.nbytes)
                get(torch.frombuffer(page, dtype=torch.uint8))
                os.pwritev(self._file, [page], part.at)
            else:
                get(part)
        self.tokens[slot] = self.prompts[slot] = stop
        self._begun[slot] = self._pruned[slot] = True

    def commit(self, slot: int, path: Sequence[int], ws: Workspace) -> None:
        drafted, self._drafting[slot] = self._drafting[slot], False
        if drafted or list(path) != list(range(len(path))):
            order = torch.tensor(path, dtype=torch.int32)
            for layer in self.own:
                pages.straighten(self.layers[layer], slot, order)
                if self.rated is not None:
                    self.rated.straighten(layer, self.layers[layer], slot, order)
            if drafted and path and self.observed is not None:
                start = int(self.tokens[slot])
                self.observed.commit_drafts(slot, order, start, self.layers, self._looking, ws)
        if self.reading is not None:
            self.reading.commit(slot, int(self.tokens[slot]), path)
        torch._foreach_add_([kept.lengths[slot] for kept in self._stores], len(path))
        self.tokens[slot] += len(path)
        for selecting in self._selections:
            selecting.commit(slot, path)
        tokens = int(self.tokens[slot])
        ends = self.reading is not None and self.reading.ends(slot, tokens - 1)
        if path and (tokens % BLOCK == 0 or ends):
            for layer in self.own:
                with ws.frame():
                    given = self._received(layer, 0, ws)
                    self.settling.settle(layer, slot, self.settling.new_run(layer, 0, ws), given, ws)
            if self.observed is not None:
                self.observed.advance(slot, tokens, 0)

    def rehearse(self, count: int) -> None:
        self.settling.rehearse(count)

    @contextmanager
    def whole(self, layer: int, segment: Any, ws: Workspace) -> Iterator[None]:
        if isinstance(self.evictor, Structured):
            raise UsageError(
                f"{self.evictor.name} sees of a prompt what it would see token by token, in any schedule",
                "Leave --prefill layered out.",
            )
        if self.distant is not None:
            raise UsageError(
                f"layers of which one looks for others, as with {self.composition}, are computed chunk by chunk",
                "Leave --prefill layered out.",
            )
        if self.own != list(range(len(self.owners))):
            raise UsageError(
                "layers that share keys and values with methods that let go of some are computed chunk by chunk",
                "Leave --prefill layered out, or kvsharer.",
            )
        layout, count = self.layouts[layer], len(segment.tokens)
        wanted = 0 if self.watching is None else self.watching.window
        if self.composition.pruner is not None:
            wanted = max(wanted, self.composition.pruner.window)
        wanted = max([wanted, *(method.queries for method in self.composition.methods if isinstance(method, Tabled))])
        last = min(wanted, count)
        with ws.frame():
            run = self.settling.new_run(layer, count, ws)
            q, anchor_q = ws.empty(2, last, layout.heads, layout.key_dim)
            given = self._received(layer, count, ws)
            whole = Whole(run, segment.start, last, q, anchor_q, ws.empty(last, layout.heads), given)
            self._whole = whole
            try:
                yield
            finally:
                self._whole = None
            self._look_first(layer, segment.slot, run, whole.q)
            self.settling.settle(layer, segment.slot, run, given, ws)

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
        watching, kept = self.watching, self.layers[layer]
        if watching is None or self.rated is not None or whole.given is None or lse is None:
            return
        if watching.all:
            watching.everything(kept, slot, run, at, looking, lse, whole.given, ws, scoring)
        if watching.last and at + count == total:
            turned = None if looking.anchor_q is None else whole.anchor_q
            last = Looking(whole.q, turned, looking.anchors)
            watching.lately(kept, slot, run, total - whole.last, last, whole.lse, whole.given, ws, scoring)

    def _look_first(self, layer: int, slot: int, run: Run, q: torch.Tensor) -> None:
        """The first queries ``q`` (n, heads, key_dim) of a sequence and its first tokens decide which channels of keys
        stay, and what is in the tables of codecs."""
        if ops.is_dry() or self._pruned[slot]:
            return
        composition, kept, lower = self.composition, self.layers[layer], self.lower[layer]
        if composition.pruner is not None and kept.channels is not None:
            kept.channels[slot] = composition.pruner.choose(q, run.keys[:, : run.count])
        _look_up(kept, slot, composition.key_codec, composition.value_codec, run, q)
        if lower is not None:
            _look_up(lower.pages, slot, lower.demoter, lower.demoter, run, q)


def _check_alone(composition: Composition) -> None:
    """Raises UsageError where layers that share keys and values would lose some before all of them read them."""
    evictor = composition.evictor
    pooled = evictor is not None and evictor.budget == "dynamickv"
    for method in composition.methods:
        if isinstance(method, Structured | Streamer) or (pooled and method is evictor):
            raise UsageError(
                f"{method.name} lets go of tokens of a layer before others would have read them",
                "Use it without layers that share keys and values.",
            )


def _close(file: int, staging: Sequence[pages.Staging]) -> None:
    for each in staging:
        each.rest()
    if file >= 0:
        os.close(file)


def _part(x: torch.Tensor | None, start: int, stop: int | None) -> torch.Tensor | None:
    return None if x is None else x[start:stop]


def _look_up(
    kept: Pages, slot: int, of_keys: Tabled | None, of_values: Tabled | None, run: Run, q: torch.Tensor
) -> None:
    """Fills the tables of codecs that a sequence has for itself."""
    for codec, side, method, of_run in (
        (kept.key_codec, kept.key_side, of_keys, run.keys),
        (kept.value_codec, kept.value_side, of_values, run.values),
    ):
        if side is not None and method is not None and not codec.coupled:
            last = q[len(q) - min(method.queries, len(q)) :]
            side[slot] = method.table(codec, of_run[:, : run.count], last, of_run is run.keys)


def _placed(x: torch.Tensor, arena: Arena) -> torch.Tensor:
    placed = place(arena, tuple(x.shape), x.dtype)
    placed.copy_(x)
    return placed
