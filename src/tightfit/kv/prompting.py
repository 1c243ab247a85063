"""Prompts on their way through the layers of a cache of pages.

What a chunk of a prompt adds to a layer is a run in scratch memory. Its tokens look at what is kept and at the run;
then the run is settled, unless more of the prompt comes first, or other layers that read the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tightfit.budget.ledger import Workspace
from tightfit.errors import UsageError
from tightfit.kernels import ops, pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import Looking, Pages, Run
from tightfit.kv.base import SegmentLike, Step, before
from tightfit.kv.method import Structured, Tabled
from tightfit.kv.observed import Chunk
from tightfit.kv.settling import Settling
from tightfit.kv.store import Store


@dataclass
class Held:
    """A step's tokens of one layer on their way through attention: the run of each prompt and the place of its first
    token there, the queries that look at anchors, and what the tokens are worth (n, kv_heads)."""

    runs: list[tuple[Run, int]]
    anchor_q: torch.Tensor | None
    worth: torch.Tensor | None = None

    def looking(self, q: torch.Tensor, a: int, b: int, anchors: int) -> Looking:
        """How tokens ``a`` to ``b`` of the step look, ``q`` being the queries of all."""
        return Looking(q, self.anchor_q, anchors).part(a, b)


@dataclass
class Shared:
    """What several layers read of a prompt's tokens, and what those received from all of them so far."""

    run: Run
    given: torch.Tensor | None


@dataclass
class Whole(Shared):
    """A whole prompt on its way through one layer, from its token ``start`` on, and how its last queries looked:
    ``looking`` (last, heads, key_dim), ``lse`` (last, heads)."""

    start: int
    looking: Looking
    lse: torch.Tensor


@dataclass
class Stretch:
    """Tokens ``a`` to ``b`` of a step, of its ``index``-th prompt, which are those of ``run`` from ``at`` on."""

    segment: SegmentLike
    index: int
    a: int
    b: int
    run: Run
    at: int


class Prompting:
    """How prompts go through the layers of ``store``; ``settling`` is what happens to their tokens then."""

    def __init__(self, store: Store, settling: Settling) -> None:
        self.store, self.settling = store, settling
        self.looked = [False] * store.sequences  # whether its first tokens decided what they decide
        self._whole: Whole | None = None
        self._shared: dict[int, list[Shared]] = {}  # of each owner that others read, for each prompt of a step
        # After which layer the tokens of each owner may leave: the last one that reads them, or needs them there.
        layers, distant = len(store.layouts), store.distant
        after = list(range(layers)) if distant is None else distant.settled_after(layers)
        self._last = {owner: after[layer] for layer, owner in enumerate(store.owners)}

    @contextmanager
    def through(self, step: Step, awaited: set[int], ws: Workspace) -> Iterator[None]:
        """Inside, what others read of a prompt's tokens stays in scratch memory until the last of them has: zeros at
        first where it is ``awaited``."""
        with ws.frame():
            counts = [b - a for _, a, b in step.prefills]
            for owner, last in self._last.items():
                if last != owner or self.store.owners.count(owner) > 1:
                    self._shared[owner] = [self._new_shared(owner, count, owner in awaited, ws) for count in counts]
            if self.store.distant is not None:
                self.store.distant.begin(step, ws)
            try:
                yield
            finally:
                self._shared = {}
                if self.store.distant is not None:
                    self.store.distant.runs = {}

    def _new_shared(self, owner: int, count: int, awaited: bool, ws: Workspace) -> Shared:
        run = self.settling.new_run(owner, count, ws)
        if awaited:
            ops.zero_(run.keys)
            ops.zero_(run.values)
        return Shared(run, self.store.received(owner, count, ws))

    def shared_runs(self, layer: int) -> list[tuple[Run, int]]:
        """The runs of a layer that reads another one's keys and values."""
        return [(each.run, 0) for each in self._shared.get(self.store.owners[layer], ())]

    def runs(
        self, layer: int, step: Step, k: torch.Tensor, v: torch.Tensor | None, ws: Workspace
    ) -> list[tuple[Run, int]]:
        """The runs of a layer with the ``k`` and ``v`` of a step's tokens, and where these begin there."""
        shared, runs = self._shared.get(self.store.owners[layer]), []
        for index, (segment, a, b) in enumerate(step.prefills):
            if shared is not None:
                run, at = shared[index].run, 0
            elif self._whole is None:
                run, at = self.settling.new_run(layer, b - a, ws), 0
            else:
                run, at = self._whole.run, segment.start - self._whole.start
                run = Run(run.keys, run.values, at + b - a)
            ops.copy_(run.keys[:, at : at + b - a], k[a:b].transpose(0, 1))
            if v is not None:
                ops.copy_(run.values[:, at : at + b - a], v[a:b].transpose(0, 1))
            runs.append((run, at))
        return runs

    def attend(
        self,
        layer: int,
        step: Step,
        held: Held,
        q: torch.Tensor,
        out: torch.Tensor,
        ws: Workspace,
        scoring: Scoring,
        settled: bool,
    ) -> None:
        """Attention of a step's prompts; what they add is certain then if ``settled``."""
        reading, tokens = self.store.reading, self.store.tokens
        for index, ((segment, a, b), (run, at)) in enumerate(zip(step.prefills, held.runs, strict=True)):
            if reading is None or not reading.acts:
                self._attend(layer, Stretch(segment, index, a, b, run, at), held, q, out, ws, scoring, settled)
                continue
            stretches = list(reading.stretches(segment.slot, segment.start, b - a))
            for first, stop in [(0, b - a)] if ops.is_dry() else stretches:  # a stretch may be the whole chunk
                if not ops.is_dry():
                    tokens[segment.slot] = segment.start + first
                with ws.frame():
                    part = self._part(layer, run, first, stop, ws)
                    stretch = Stretch(segment, index, a + first, a + stop, part, 0)
                    self._attend(layer, stretch, held, q, out, ws, scoring, settled)
            if not ops.is_dry():
                tokens[segment.slot] = segment.start

    def _part(self, layer: int, run: Run, start: int, stop: int, ws: Workspace) -> Run:
        """Some tokens of a run, with room behind them where some may be turned."""
        if not self.store.turning:
            return run.part(start, stop)
        part = self.settling.new_run(layer, stop - start, ws)
        ops.copy_(part.keys[:, : stop - start], run.keys[:, start:stop])
        ops.copy_(part.values[:, : stop - start], run.values[:, start:stop])
        return part

    def _attend(
        self,
        layer: int,
        stretch: Stretch,
        held: Held,
        q: torch.Tensor,
        out: torch.Tensor,
        ws: Workspace,
        scoring: Scoring,
        settled: bool,
    ) -> None:
        """Attention of a stretch; what it adds is certain then, unless others read it or more of the prompt comes
        first."""
        store, rated, a, b, run = self.store, self.store.rated, stretch.a, stretch.b, stretch.run
        kept, slot, beside = store.layers[layer], stretch.segment.slot, store.beside[layer]
        watching = None if rated is not None else store.watching
        with ws.frame():
            looking = held.looking(q, a, b, store.anchors(layer))
            lse = ws.empty(b - a, q.shape[1]) if watching is not None or beside else None
            bf16 = store.gemm_dtype == torch.bfloat16
            if store.layouts[layer].past:
                _attend_before(kept, stretch, looking, out[a:b], ws, scoring, bf16)
            else:
                pages.attend(kept, slot, run, stretch.at, looking, out[a:b], lse, ws, scoring, bf16)
            chunk = None if lse is None else Chunk(kept, slot, run, stretch.at, looking, lse, scoring)
            if lse is not None:
                for each in beside:
                    each.join(slot, looking.q, out[a:b], lse, ws, scoring, bf16)
            if store.distant is not None:
                store.distant.runs.setdefault(slot, {})[layer] = run
            common = self._shared.get(store.owners[layer])
            held_by = self._whole or (None if common is None else common[stretch.index])
            given = store.received(layer, run.count, ws) if held_by is None else held_by.given
            if rated is not None and held.worth is not None and given is not None:
                rated.put_chunk(kept, slot, stretch.at, held.worth[a:b], given)
            if self._whole is not None:
                self._note(self._whole, stretch.at, looking, chunk, ws)
                return
            if watching is not None and chunk is not None and given is not None:
                watching.chunk(chunk, given, ws)
            if settled:
                if layer == store.owners[layer]:
                    self._look_first(layer, slot, run, looking.q)
                self._settle(layer, stretch, given, ws)

    def _settle(self, layer: int, stretch: Stretch, given: torch.Tensor | None, ws: Workspace) -> None:
        """What waited for this layer is certain now."""
        segment, owner = stretch.segment, self.store.owners[layer]
        whole = segment.stop >= (segment.length or 0)
        for waiting in self.store.own:
            if self._last[waiting] != layer:
                continue
            run, received = stretch.run, given
            if waiting != owner:
                of_layer = self._shared[waiting][stretch.index]
                run, received = of_layer.run, of_layer.given
            self.settling.settle(waiting, segment.slot, run, received, ws, whole)

    # ---- a whole prompt, layer by layer ----

    @contextmanager
    def whole(self, layer: int, segment: SegmentLike, count: int, ws: Workspace) -> Iterator[None]:
        """Inside, the chunks of a prompt of ``count`` tokens go through one layer; at the end they are certain there.
        Raises UsageError if layers cannot be computed one after the other."""
        store = self.store
        self._check_layered()
        layout, composition = store.layouts[layer], store.composition
        wanted = 0 if store.watching is None else store.watching.window
        if composition.pruner is not None:
            wanted = max(wanted, composition.pruner.window)
        wanted = max([wanted, *(method.queries for method in composition.methods if isinstance(method, Tabled))])
        last = min(wanted, count)
        with ws.frame():
            run = self.settling.new_run(layer, count, ws)
            q, anchor_q = ws.empty(2, last, layout.heads, layout.key_dim)
            given = store.received(layer, count, ws)
            looking = Looking(q, anchor_q, store.anchors(layer))
            self._whole = whole = Whole(run, given, segment.start, looking, ws.empty(last, layout.heads))
            try:
                yield
            finally:
                self._whole = None
            self._look_first(layer, segment.slot, run, whole.looking.q)
            self.settling.settle(layer, segment.slot, run, given, ws)

    def _check_layered(self) -> None:
        store = self.store
        if isinstance(store.evictor, Structured):
            raise UsageError(
                f"{store.evictor.name} sees of a prompt what it would see token by token, in any schedule",
                "Leave --prefill layered out.",
            )
        if store.distant is not None:
            raise UsageError(
                f"layers of which one looks for others, as with {store.composition}, are computed chunk by chunk",
                "Leave --prefill layered out.",
            )
        if len(store.own) < len(store.layouts):
            raise UsageError(
                "layers that share keys and values with methods that let go of some are computed chunk by chunk",
                "Leave --prefill layered out, or kvsharer.",
            )

    def _note(self, whole: Whole, at: int, looking: Looking, chunk: Chunk | None, ws: Workspace) -> None:
        """Keeps what is wanted of the queries of a chunk, which begins at token ``at`` of a whole prompt; all of them
        are weighed chunk by chunk, the last ones when they are there."""
        count, total, last = len(looking.q), whole.run.count, len(whole.lse)
        first = max(total - last - at, 0)  # of this chunk's, the first that is among the last of all
        if first < count:
            to = at + first - (total - last)
            rows = slice(to, to + count - first)
            ops.copy_(whole.looking.q[rows], looking.q[first:])
            if looking.anchor_q is not None:
                assert whole.looking.anchor_q is not None
                ops.copy_(whole.looking.anchor_q[rows], looking.anchor_q[first:])
            if chunk is not None:
                ops.copy_(whole.lse[rows], chunk.lse[first:])
        watching = self.store.watching
        if watching is None or self.store.rated is not None or whole.given is None or chunk is None:
            return
        if watching.all:
            watching.everything(chunk, whole.given, ws)
        if watching.last and at + count == total:
            of_all = whole.looking if looking.anchor_q is not None else whole.looking._replace(anchor_q=None)
            watching.lately(chunk._replace(at=total - last, looking=of_all, lse=whole.lse), whole.given, ws)

    # ---- what the first tokens decide ----

    def _look_first(self, layer: int, slot: int, run: Run, q: torch.Tensor) -> None:
        """The first queries ``q`` (n, heads, key_dim) of a sequence and its first tokens decide which channels of keys
        stay, and what is in the tables of codecs."""
        if ops.is_dry() or self.looked[slot]:
            return
        composition, kept = self.store.composition, self.store.layers[layer]
        lower = self.store.lower[layer]
        if composition.pruner is not None and kept.channels is not None:
            kept.channels[slot] = composition.pruner.choose(q, run.keys[:, : run.count])
        _fill_tables(kept, slot, composition.key_codec, composition.value_codec, run, q)
        if lower is not None:
            _fill_tables(lower.pages, slot, lower.demoter, lower.demoter, run, q)


def _attend_before(
    kept: Pages, stretch: Stretch, looking: Looking, out: torch.Tensor, ws: Workspace, scoring: Scoring, bf16: bool
) -> None:
    """Attention of tokens that see those before their own: the first one what is certain."""
    slot, run = stretch.segment.slot, stretch.run
    if stretch.segment.start == 0:
        ops.zero_(out[:1])
    else:
        first = looking.part(0, 1)._replace(certain=True)
        pages.attend(kept, slot, run, 0, first, out[:1], None, ws, scoring, bf16)
    if len(out) > 1:
        pages.attend(kept, slot, run, 0, looking.part(1, None), out[1:], None, ws, before(scoring), bf16)


def _fill_tables(kept: Pages, slot: int, of_keys: object, of_values: object, run: Run, q: torch.Tensor) -> None:
    """Fills the tables of codecs that a sequence has for itself, where these methods make some."""
    for codec, side, method, of_run in (
        (kept.key_codec, kept.key_side, of_keys, run.keys),
        (kept.value_codec, kept.value_side, of_values, run.values),
    ):
        if side is not None and isinstance(method, Tabled) and not codec.coupled:
            last = q[len(q) - min(method.queries, len(q)) :]
            side[slot] = method.table(codec, of_run[:, : run.count], last, of_run is run.keys)
