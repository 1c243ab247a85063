"""A cache that lets go of tokens, stores them in few bits, reads only some of them or keeps them in a file.

All of these are the same store of pages (:mod:`tightfit.kernels.pages`) with another list of tokens or another kind of
page. What a prompt's chunk adds lies in scratch memory while its layer is computed; then it is certain, methods judge
it, and what stays is written. What decoding adds is tentative until :meth:`PagedCache.commit`; tokens are judged, coded
and moved when their sequence has a multiple of 32 tokens, never between, so that drafts which are refused leave no
trace.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import Counts, Rows
from tightfit.kv.base import BLOCK, BaseCache, LayerLayout, Move, Step, Turn, Turned, before, check_alone
from tightfit.kv.compose import Composition
from tightfit.kv.entries import InFile
from tightfit.kv.evict.window import Window
from tightfit.kv.fitted import NOTHING, Known
from tightfit.kv.method import Structured
from tightfit.kv.prompting import Held, Prompting
from tightfit.kv.reading import Encode
from tightfit.kv.settling import Settling
from tightfit.kv.store import Store
from tightfit.kv.turning import stand


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
        self.store = store = Store(layouts, composition, context, sequences, dtype, arena, gemm_dtype, tail, known)
        self.layouts, self.owners, self.sequences, self.gemm_dtype = layouts, store.owners, sequences, gemm_dtype
        self.evictor, self.tokens, self.layers = store.evictor, store.tokens, store.layers
        self.anchors = 0 if self.evictor is None else self.evictor.anchors
        self.repeatable = all(each.repeats for found in store.beside for each in found)
        self.settling = Settling(store, arena)
        self.prompting = Prompting(store, self.settling)
        self._nbytes = store.nbytes
        self._begun = [False] * sequences
        self._drafting = [False] * sequences

    def close(self) -> None:
        self.store.close()

    def chosen(self, layer: int, slot: int = 0) -> list[tuple[int, float]]:
        """Of each head, among how many tokens the next one chooses, and how many of them it reads on average."""
        selector, selecting = self.store.reserved.of_layers[layer].selector, self.store.selecting[layer]
        if selector is None or selecting is None:
            return [(0, 0.0)] * self.layouts[layer].kv_heads
        return [(among, selector.reads(among)) for among in selecting.among(slot)]

    @property
    def fetched(self) -> Counts:
        """What was brought from the file so far by a tier that reads ahead, of all layers."""
        counts = [Counts(0, 0, 0, 0), *(each.counts for each in self.store.staging)]
        return Counts(*(sum(numbers) for numbers in zip(*counts, strict=True)))

    # ---- what tokens there are ----

    @property
    def reads(self) -> bool:
        return self.store.reading is not None

    def resolve(self, encode: Encode) -> None:
        if self.store.reading is not None:
            self.store.reading.resolve(encode)

    def told(self, slot: int, start: int, tokens: Sequence[int]) -> None:
        if self.store.reading is not None:
            self.store.reading.told(slot, start, tokens)

    def standing(self, step: Step, positions: torch.Tensor) -> torch.Tensor:
        if not self.store.turning or self.store.reading is None or not isinstance(self.evictor, Structured):
            return positions
        return stand(
            self.layers[0], self.store.reading, self.evictor, partial(self.store.reserved.limit, 0), step, positions
        )

    # ---- a step ----

    def anchor_positions(self, positions: torch.Tensor) -> torch.Tensor:
        if isinstance(self.evictor, Window) and self.evictor.positions == "cache":
            return positions.clamp(max=int(self.evictor.keep) - 1)
        return positions

    @contextmanager
    def through(self, step: Step, ws: Workspace) -> Iterator[None]:
        with self.prompting.through(step, self.awaited, ws):
            yield

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
        kept, rated, anchor_q, worth = self.layers[layer], self.store.rated, None, None
        if rated is not None and q_ is not None and k_ is not None and v is not None:
            worth = rated.rate(layer, step, q_, k_, v, ws)
        if turn is not None and q_ is not None:
            anchor_q = turn.apply(q_, k_, self.store.anchors(layer) > 0, ws)
        if k_ is None:
            return Held(self.prompting.shared_runs(layer), anchor_q)
        rows = step.vector
        if rows:
            pages.append(kept, Rows(step.places), k_[:rows], None if v is None else v[:rows])
            if rated is not None and worth is not None:
                rated.put(layer, kept, Rows(step.places), worth[:rows])
        return Held(self.prompting.runs(layer, step, k_, v, ws), anchor_q, worth)

    def attend_step(
        self, layer: int, step: Step, held: Held, q: torch.Tensor, out: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        if isinstance(self.evictor, Window):
            visible = int(self.evictor.keep) - self.store.anchors(layer)
            scoring = scoring._replace(window=min(visible, scoring.window or visible))
        if step.vector:
            with ws.frame():
                self._attend_rows(layer, step, held, q[: step.vector], out[: step.vector], ws, scoring)
        self.prompting.attend(layer, step, held, q, out, ws, scoring, self.settled)

    def _attend_rows(
        self, layer: int, step: Step, held: Held, q: torch.Tensor, out: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        """Attention of the tokens of a step that decode."""
        store, past = self.store, self.layouts[layer].past
        kept, beside, selecting = self.layers[layer], store.beside[layer], store.selecting[layer]
        observed = None if store.rated is not None else store.observed
        if past:
            check_alone(step)
        rows, anchor_q = Rows(step.places, step.paths), None if held.anchor_q is None else held.anchor_q[: len(q)]
        looking = store.looking(layer, rows, q, anchor_q, ws, scoring)
        sums = observed is not None or bool(beside) or (selecting is not None and selecting.joins)
        lse = ws.empty(*q.shape[:2]) if sums else None
        if past:
            pages.attend_rows(kept, rows, looking._replace(certain=True), out, lse, ws, before(scoring))
        else:
            pages.attend_rows(kept, rows, looking, out, lse, ws, scoring)
        if lse is None:
            return
        if selecting is not None:
            selecting.join_rows(rows, looking, out, lse, ws, scoring)
        for each in beside:
            each.join_rows(rows, q, out, lse, ws, scoring)
        if observed is not None and step.tentative:
            observed.drafts[layer].put(rows, self.tokens, looking, lse, scoring)
            for slot in set(step.places[: len(q), 0].tolist()):
                self._drafting[slot] = True
        elif observed is not None:
            observed.rows(layer, kept, rows, looking, lse, ws, scoring)

    # ---- tokens that are certain ----

    def begin(self, slot: int, start: int) -> None:
        if start and self._begun[slot] and start == int(self.tokens[slot]):
            return
        if start:
            raise ValueError(f"sequence {slot} has {int(self.tokens[slot])} tokens, and goes on at {start}")
        self._clear(slot)
        self._begun[slot] = True
        self.store.begin(slot)

    def _clear(self, slot: int) -> None:
        """Forgets a sequence."""
        self._begun[slot] = self.prompting.looked[slot] = False
        self.store.clear(slot)
        self.settling.clear(slot)

    def prefilled(self, slot: int, start: int, stop: int) -> None:
        self.tokens[slot] = self.store.prompts[slot] = stop
        self.prompting.looked[slot] = True
        if self.store.observed is not None:
            self.store.observed.advance(slot, stop, stop - start)

    def room(self, slot: int) -> int:
        if self.reads or any(layout.past for layout in self.layouts):
            return 1
        return min(BLOCK - int(self.tokens[slot]) % BLOCK, self.store.tail)

    def reusable(self, slot: int, common: int) -> int:
        return common if common == int(self.tokens[slot]) else 0

    # ---- what is kept of prompts ----

    def largest_entry(self, chunk: int) -> int:
        in_file = self.store.reserved.file_bytes if self.store.file >= 0 else 0
        return -(-(self._nbytes + in_file) // self.sequences)

    def entry_nbytes(self, slot: int, start: int, stop: int) -> int:
        return sum(part.nbytes for part in self._parts(slot)) if int(self.tokens[slot]) == stop else 0

    def save(self, slot: int, start: int, stop: int, put: Move) -> None:
        for part in self._parts(slot):
            if isinstance(part, InFile):
                page = bytearray(part.nbytes)
                os.preadv(self.store.file, [page], part.at)
                put(torch.frombuffer(page, dtype=torch.uint8))
            else:
                put(part)

    def _parts(self, slot: int) -> Iterator[torch.Tensor | InFile]:
        yield from self.store.parts(slot)
        yield from self.settling.parts(slot)

    def restore(self, slot: int, start: int, stop: int, get: Move) -> None:
        self._clear(slot)
        for part in self._parts(slot):
            if isinstance(part, InFile):
                page = bytearray(part.nbytes)
                get(torch.frombuffer(page, dtype=torch.uint8))
                os.pwritev(self.store.file, [page], part.at)
            else:
                get(part)
        self.tokens[slot] = self.store.prompts[slot] = stop
        self._begun[slot] = self.prompting.looked[slot] = True

    def commit(self, slot: int, path: Sequence[int], ws: Workspace) -> None:
        drafted, self._drafting[slot] = self._drafting[slot], False
        if drafted or list(path) != list(range(len(path))):
            order = torch.tensor(path, dtype=torch.int32)
            for layer in self.own:
                pages.straighten(self.layers[layer], slot, order)
                if self.store.rated is not None:
                    self.store.rated.straighten(layer, self.layers[layer], slot, order)
            if drafted and path and self.store.observed is not None:
                start = int(self.tokens[slot])
                self.store.observed.commit_drafts(slot, order, start, self.layers, self.store.looking, ws)
        if self.store.reading is not None:
            self.store.reading.commit(slot, int(self.tokens[slot]), path)
        torch._foreach_add_([kept.lengths[slot] for kept in self.store.kept], len(path))
        self.tokens[slot] += len(path)
        for selecting in self.store.selections:
            selecting.commit(slot, path)
        tokens = int(self.tokens[slot])
        ends = self.store.reading is not None and self.store.reading.ends(slot, tokens - 1)
        if path and (tokens % BLOCK == 0 or ends):
            for layer in self.own:
                with ws.frame():
                    given = self.store.received(layer, 0, ws)
                    self.settling.settle(layer, slot, self.settling.new_run(layer, 0, ws), given, ws)
            if self.store.observed is not None:
                self.store.observed.advance(slot, tokens, 0)

    def rehearse(self, count: int) -> None:
        self.settling.rehearse(count)

    @contextmanager
    def whole(self, layer: int, segment: Any, ws: Workspace) -> Iterator[None]:
        with self.prompting.whole(layer, segment, len(segment.tokens), ws):
            yield
