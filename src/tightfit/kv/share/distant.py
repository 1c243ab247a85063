"""Distant tokens that layers keep together: the keys of the first of them, and the values of all.

A group is some key-value heads of consecutive layers. What leaves the window of its layers lies in one lower store,
whose values are those of all its layers, side by side. When the first layer looks at it, each of its weights meets the
values of every layer at once: the other layers take their part of that when their turn comes, and compute no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import ops, pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.codec import Codec
from tightfit.kernels.pages import Looking, Pages, Rows, Run
from tightfit.kv.base import LayerLayout, Step
from tightfit.kv.beside import Beside, Going
from tightfit.kv.entries import InFile
from tightfit.kv.lower import LowerStore, alone
from tightfit.kv.merge.tokens import READ_AT_ONCE, TokensAt
from tightfit.kv.method import Coder, Group, Lowering

Source = tuple[Pages, Run]  # what a layer has of a sequence


class Found(NamedTuple):
    """What queries found among distant tokens: ``out`` (n, heads, dim) for all layers of each head's group, side by
    side, and ``lse`` (n, heads)."""

    out: torch.Tensor
    lse: torch.Tensor


class AsCoded(Lowering):
    """Distant tokens are kept in the codes of the composition's methods, or as they are."""

    def __init__(self, of_keys: Coder | None, of_values: Coder | None) -> None:
        self._coders = of_keys, of_values

    def lower(self, layout: LayerLayout, as_they_are: int) -> tuple[Codec, Codec]:
        keys, values = (
            Codec(as_they_are, dim, of_keys) if coder is None else coder.codec(dim, of_keys, as_they_are)
            for coder, dim, of_keys in zip(self._coders, (layout.key_dim, layout.value_dim), (True, False), strict=True)
        )
        return keys, values


class DistantStore(LowerStore):
    """The distant tokens of one group, whose layers have ``layouts``. Other arguments as of a lower store."""

    def __init__(
        self,
        group: Group,
        layouts: Sequence[LayerLayout],
        coding: Lowering,
        most: int,
        longest: int,
        sequences: int,
        dtype: torch.dtype,
        arena: Arena,
        tokens: torch.Tensor,
        file: int,
        at: int,
    ) -> None:
        first = layouts[0]
        queries = first.heads // first.kv_heads
        self.group = group
        self.heads = slice(group.heads.start * queries, group.heads.stop * queries)  # of queries
        self.columns: dict[int, slice] = {}  # of each layer, among the values
        width = 0
        for layer, layout in zip(group.layers, layouts, strict=True):
            self.columns[layer] = slice(width, width + layout.value_dim)
            width += layout.value_dim
        together = replace(first, kv_heads=len(group.heads), heads=len(group.heads) * queries, value_dim=width)
        super().__init__(coding, together, most, longest, sequences, dtype, arena, tokens, file, at)
        self._sources: list[Source] = []

    def take_from(self, slot: int, sources: list[Source], places: torch.Tensor, ws: Workspace) -> None:
        """Takes over the tokens at ``places`` (n,) int64, ascending, which are the same in all heads, of what each
        layer has."""
        self._sources = sources
        upper, run = sources[0]
        for at in range(0, len(places), READ_AT_ONCE):
            self._take(slot, upper, run, [places[at : at + READ_AT_ONCE]] * len(self.group.heads), ws)
        self._sources = []

    def _read(self, tokens: TokensAt, keys_: torch.Tensor, values_: torch.Tensor, add: bool) -> None:
        head = self.group.heads[tokens.head]
        for index, ((upper, run), columns) in enumerate(zip(self._sources, self.columns.values(), strict=True)):
            at = 0
            for block in replace(tokens, pages=upper, run=run, head=head).blocks():
                rows = slice(at, at + len(block.keys))
                if index == 0:
                    ops.copy_(keys_[rows], block.keys)
                assert block.values is not None
                ops.copy_(values_[rows, columns], block.values)
                at = rows.stop

    def _part(self, found: Found) -> Found:
        """The part of what all heads found that is this group's."""
        return Found(found.out[:, self.heads, : self.pages.value_shape[1]], found.lse[:, self.heads])

    def look_rows(self, rows: Rows, q: torch.Tensor, found_: Found, ws: Workspace, scoring: Scoring) -> None:
        """Has rows that decode look with the queries of the first layer."""
        out, lse = self._part(found_)
        looking = Looking(q[:, self.heads], certain=True)
        pages.attend_rows(self.pages, Rows(rows.places), looking, out, lse, ws, alone(scoring))

    def look(self, slot: int, q: torch.Tensor, found_: Found, ws: Workspace, scoring: Scoring, bf16: bool) -> None:
        """The same for tokens of a prompt."""
        kept, (out, lse) = self.pages, self._part(found_)
        nothing = Run(kept.keys[slot], kept.values[slot], 0)
        looking = Looking(q[:, self.heads], certain=True)
        pages.attend(kept, slot, nothing, 0, looking, out, lse, ws, alone(scoring), bf16)

    def join_found(self, layer: int, found: Found, out_: torch.Tensor, lse_: torch.Tensor) -> None:
        """Makes of a layer's attention over its pages that over both."""
        out, lse = self._part(found)
        pages.join(out_[:, self.heads], lse_[:, self.heads], out[..., self.columns[layer]], lse)


class Distants:
    """The groups of a cache, ``layers`` being the pages of all layers."""

    def __init__(self, stores: Sequence[DistantStore], layers: Sequence[Pages], layouts: Sequence[LayerLayout]) -> None:
        self.stores, self.layers = stores, layers
        of_groups = [layouts[store.group.layers[0]] for store in stores]
        self._heads = max((layout.heads for layout in of_groups), default=0)
        self._width = max((store.pages.value_shape[1] for store in stores), default=0)
        self.of_rows = self._room(0, None)
        self.of_prompts: dict[int, Found] = {}
        self.runs: dict[int, dict[int, Run]] = {}  # of each sequence and layer, what a prompt's chunk adds

    def _room(self, count: int, ws: Workspace | None) -> Found:
        shapes = (count, self._heads, self._width), (count, self._heads)
        out, lse = (torch.empty(shape) if ws is None else ws.empty(*shape) for shape in shapes)
        return Found(out, lse)

    def begin(self, step: Step, ws: Workspace) -> None:
        """Takes room in the enclosing frame for what the tokens of a step find, until all layers of a group have it."""
        self.of_rows = self._room(step.vector, ws)
        self.of_prompts = {segment.slot: self._room(b - a, ws) for segment, a, b in step.prefills}

    def source(self, slot: int, layer: int) -> Source:
        kept = self.layers[layer]
        run = self.runs.get(slot, {}).get(layer)
        return kept, Run(kept.keys[slot], kept.values[slot], 0) if run is None else run

    def settled_after(self, layers: int) -> list[int]:
        """Of each layer the one after which its tokens may leave: those of a group do so together, at the settling of
        its first layer, when the last one has been computed."""
        after = list(range(layers))
        for layer in range(layers):
            for store in self.stores:
                first, last = store.group.layers[0], store.group.layers[-1]
                if first <= layer <= last:
                    after[layer] = max(after[layer], last if first == layer else after[first])
        return after


class Distant(Beside):
    """What queries of one layer see of distant tokens."""

    def __init__(self, distants: Distants, layer: int) -> None:
        self.layer, self._all = layer, distants
        self._parts = [store for store in distants.stores if layer in store.group.layers]
        self._own = [store for store in self._parts if store.group.layers[0] == layer]

    @property
    def stores(self) -> list[Pages]:
        return [store.pages for store in self._own]

    def take(self, going: Going, ws: Workspace) -> None:
        self._take(going.slot, going.places(0), ws)

    def take_most(self, slot: int, upper: Pages, run: Run, ws: Workspace) -> None:
        self._take(slot, torch.arange(READ_AT_ONCE), ws)

    def _take(self, slot: int, places: torch.Tensor, ws: Workspace) -> None:
        for store in self._own:  # for the other layers too, whose tokens leave next
            store.take_from(slot, [self._all.source(slot, layer) for layer in store.group.layers], places, ws)

    def join_rows(
        self, rows: Rows, q: torch.Tensor, out_: torch.Tensor, lse_: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        for store in self._own:
            store.look_rows(rows, q, self._all.of_rows, ws, scoring)
        for store in self._parts:
            store.join_found(self.layer, self._all.of_rows, out_, lse_)

    def join(
        self,
        slot: int,
        q: torch.Tensor,
        out_: torch.Tensor,
        lse_: torch.Tensor,
        ws: Workspace,
        scoring: Scoring,
        bf16: bool,
    ) -> None:
        found = self._all.of_prompts[slot]
        for store in self._own:
            store.look(slot, q, found, ws, scoring, bf16)
        for store in self._parts:
            store.join_found(self.layer, found, out_, lse_)

    def clear(self, slot: int) -> None:
        for store in self._own:
            store.clear(slot)

    def parts(self, slot: int) -> Iterator[torch.Tensor | InFile]:
        for store in self._own:
            yield from store.parts(slot)
