"""What a cache of pages is made of: of each layer its pages, and what chooses, judges, merges or sees beside them."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.errors import UsageError
from tightfit.kernels import pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import PAGE, Looking, Rows
from tightfit.kv.base import BLOCK, LayerLayout
from tightfit.kv.beside import Beside
from tightfit.kv.cache import as_bytes, numbers, place, placed
from tightfit.kv.compose import Composition
from tightfit.kv.entries import InFile, parts
from tightfit.kv.fitted import Known
from tightfit.kv.lower import LowerStore
from tightfit.kv.merge.merging import Merging
from tightfit.kv.method import Merger, Rater, Streamer, Structured
from tightfit.kv.observed import Observed, Observer
from tightfit.kv.pooled import Pooled
from tightfit.kv.rated import Rated
from tightfit.kv.reading import Reading
from tightfit.kv.reserved import Reserved
from tightfit.kv.rest import Resting
from tightfit.kv.select.selecting import Selecting, Where
from tightfit.kv.share.distant import Distant
from tightfit.kv.turning import Turning

Made = TypeVar("Made")


class Store:
    """The parts of a :class:`~tightfit.kv.paged.PagedCache`, whose arguments it takes; lists have one of each layer,
    that of its owner where a layer reads another one's keys and values.

    ``tokens`` and ``prompts`` (sequences,) int32 say how many tokens came of each sequence, and how many with its
    prompt or before it."""

    def __init__(
        self,
        layouts: list[LayerLayout],
        composition: Composition,
        context: int,
        sequences: int,
        dtype: torch.dtype,
        arena: Arena,
        gemm_dtype: torch.dtype,
        tail: int,
        known: Known,
    ) -> None:
        composition.check(layouts)
        self.layouts = layouts
        self.composition = composition = composition.with_found(known, lambda found: placed(found, arena))
        self.context, self.sequences, self.tail = context, sequences, tail
        self.dtype, self.gemm_dtype = dtype, gemm_dtype
        self.owners = list(range(len(layouts)) if known.owners is None else known.owners)
        self.own = [layer for layer, owner in enumerate(self.owners) if layer == owner]
        if len(self.own) < len(layouts):
            _check_alone(composition)
        self.evictor = evictor = composition.evictor
        streamer = composition.streamer
        self.streams = None if streamer is None else streamer.streams(layouts, known)
        self.reserved = reserved = Reserved(layouts, composition, context, sequences, tail, known, self.streams)
        self.file = -1 if composition.tier is None else composition.tier.open()
        self.staging: list[pages.Staging] = []
        self.close = weakref.finalize(self, _close, self.file, self.staging)
        prepared = []
        if isinstance(evictor, Rater):
            tensors = known.of(evictor)
            prepared = self._of_owners(lambda layer: evictor.prepare(layer, tensors, arena))
        self._arena, self._before = arena, arena.used  # from here on it is of sequences
        self.tokens = numbers(arena, sequences)
        self.prompts = numbers(arena, sequences)
        self.layers = self._of_owners(lambda layer: reserved.pages(layer, arena, dtype, self.tokens, self.file))
        self.kept = [self.layers[layer] for layer in self.own]
        if composition.tier is not None:
            self.staging += composition.tier.stage(self.kept, [reserved.selects(layer) for layer in self.own], arena)
        self.reading: Reading | None = None
        if composition.reads is not None:
            self.reading = Reading(composition.reads, context, sequences, tail, arena)
        self.turning: list[Turning] = []
        if isinstance(evictor, Structured) and evictor.reuses:
            self.turning = self._of_owners(self._turning)
        self.merging: list[Merging] = []
        if isinstance(evictor, Merger):
            self.merging = self._of_owners(lambda layer: self._merging(evictor, layer))
        self.selecting = self._of_owners(lambda layer: self._selecting(layer, known))
        self.selections = [found for layer in self.own if (found := self.selecting[layer]) is not None]
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
        self.distant = reserved.distant(self.layers, arena, dtype, self.tokens, self.file, known)
        self.beside = self._of_owners(lambda layer: self._beside(layer, known))
        self.pooled: dict[int, Pooled] = {}  # of each layer that shares what it keeps with others
        for layer in self.own:
            if reserved.pooled(layer) and layer not in self.pooled:
                layers = reserved.common(layer)
                self.pooled |= dict.fromkeys(layers, self._pooling(layers))
        self._keep_centroids(known)

    @property
    def nbytes(self) -> int:
        """What sequences have taken of the arena so far."""
        return self._arena.used - self._before

    @property
    def lower(self) -> list[LowerStore | None]:
        """The lower store of each layer that has one."""
        return [next((each for each in found if isinstance(each, LowerStore)), None) for found in self.beside]

    def anchors(self, layer: int) -> int:
        """How many first tokens queries always see: none where the model itself has a window."""
        return 0 if self.evictor is None or self.layouts[layer].window is not None else self.evictor.anchors

    def looking(
        self,
        layer: int,
        rows: Rows,
        q: torch.Tensor,
        anchor_q: torch.Tensor | None,
        ws: Workspace,
        scoring: Scoring,
    ) -> Looking:
        """How rows that decode look at a layer, where they choose what they read."""
        looking, selecting = Looking(q, anchor_q, self.anchors(layer)), self.selecting[layer]
        return looking if selecting is None else selecting.look(rows, looking, ws, scoring)

    def received(self, layer: int, count: int, ws: Workspace) -> torch.Tensor | None:
        """Room for what a layer's tokens and ``count`` others receive, if that is wanted."""
        return None if self.watching is None else self.watching.room(layer, count, ws)

    # ---- sequences ----

    def begin(self, slot: int) -> None:
        """Makes room for tokens of a sequence that decode without a prompt."""
        for kept in self.kept:
            for head in range(kept.table.shape[1]):
                for page in range(-(-self.reserved.ahead // PAGE)):
                    free = kept.dense_free[slot]
                    kept.table[slot, head, page] = free[int(free[0])]
                    free[0] -= 1

    def clear(self, slot: int) -> None:
        """Forgets a sequence."""
        self.tokens[slot] = self.prompts[slot] = 0
        for layer in self.own:
            self.layers[layer].reset(slot)
            for each in self.beside[layer]:
                each.clear(slot)
        if self.observed is not None:
            self.observed.clear(slot)
        for pooled in self.pooled.values():
            pooled.clear(slot)
        for merging in self.merging:
            merging.memory[slot] = math.nan
        for selecting in self.selections:
            selecting.reset(slot)

    def parts(self, slot: int) -> Iterator[torch.Tensor | InFile]:
        """All that is kept of a sequence, part by part, as flat uint8 tensors and pages in the file."""
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
        for layer in self.own:
            mass = None if self.observed is None else self.observed.mass[layer]
            states = [self.merging[layer].memory] if self.merging else []
            yield from parts(self.layers[layer], slot, self.reserved.ahead, mass, states)
            for each in self.beside[layer]:
                yield from each.parts(slot)
            selecting = self.selecting[layer]
            if selecting is not None:
                yield from selecting.parts(slot)

    def _keep_centroids(self, known: Known) -> None:
        """Copies what was fitted into the tables of codecs."""
        for method, of_keys in ((self.composition.key_codec, True), (self.composition.value_codec, False)):
            if method is None or method.name not in known.tensors:
                continue
            found = known.of(method)
            for layer, kept in zip(self.own, self.kept, strict=True):
                side, name = (kept.key_side, "keys") if of_keys else (kept.value_side, "values")
                if side is not None:
                    side[0] = found[f"{name}.{layer}"].flatten(1)

    # ---- what a layer has ----

    def _of_owners(self, make: Callable[[int], Made]) -> list[Made]:
        """Of each layer what is made for its owner."""
        made = {layer: make(layer) for layer in self.own}
        return [made[owner] for owner in self.owners]

    def _merging(self, merger: Merger, layer: int) -> Merging:
        memory = place(self._arena, (self.sequences, self.layouts[layer].kv_heads, merger.remembers), torch.float32)
        return Merging(merger, layer, self.layers[layer], memory, self._most(layer))

    def _pooling(self, layers: Sequence[int]) -> Pooled:
        first = layers[0]
        heads, most = self.layouts[first].kv_heads, self.reserved.sizes[first].most
        return Pooled(layers, self.sequences, heads, most, self._arena)

    def _turning(self, layer: int) -> Turning:
        rotation = self.layouts[layer].rotation
        assert rotation is not None
        return Turning(self.layers[layer], rotation, self._most(layer))

    def _selecting(self, layer: int, known: Known) -> Selecting | None:
        selector = self.reserved.of_layers[layer].selector
        if selector is None or not self.reserved.selects(layer):
            return None
        names = None if self.reading is None else self.reading.names
        of_layer = layer, self.layers[layer], self.layouts[layer], self.sequences, self._most(layer), self.tail
        return selector.select(Where(*of_layer, self._arena, known.tensors.get(selector.name), names))

    def _beside(self, layer: int, known: Known) -> list[Beside]:
        """What queries of a layer see beside its pages."""
        found: list[Beside] = []
        lower = self.reserved.lower(layer, self._arena, self.dtype, self.tokens, self.file, known)
        rest = self.composition.rest
        if lower is not None:
            found.append(lower)
        if self.distant is not None:
            found.append(Distant(self.distant, layer))
        if rest is not None:
            found.append(Resting(rest, layer, self.layouts[layer], self.sequences, self._arena))
        return found

    def _most(self, layer: int) -> int:
        """How many tokens of a head a layer's tables have room for."""
        return self.reserved.sizes[layer].table_pages * PAGE


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
