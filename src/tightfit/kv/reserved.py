"""How much of each layer a composition of methods keeps, and the pages that are reserved for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tightfit.budget.ledger import Arena
from tightfit.kernels.pages import PAGE, Codec, Pages
from tightfit.kv import budgets
from tightfit.kv.base import BLOCK, LayerLayout
from tightfit.kv.cache import numbers, place, table
from tightfit.kv.compose import Composition
from tightfit.kv.fitted import Known
from tightfit.kv.lower import LowerStore
from tightfit.kv.method import Demoter, Grouper
from tightfit.kv.share.distant import AsCoded, Distants, DistantStore


@dataclass(frozen=True)
class Sizes:
    """What one layer reserves for each sequence: tokens ``kept`` by each head on average, the ``most`` that one keeps,
    pages for those and for what comes next, and pages of all heads of the layers that have theirs in common."""

    kept: int
    most: int
    table_pages: int
    dense_pages: int
    coded_pages: int


@dataclass(frozen=True)
class Pool:
    """Pages from which one or several layers of one shape take theirs, as :class:`~tightfit.kernels.pages.Pages` has
    them."""

    keys: torch.Tensor
    values: torch.Tensor
    dense_free: torch.Tensor
    coded_free: torch.Tensor
    coded_keys: torch.Tensor | None
    coded_values: torch.Tensor | None


class Reserved:
    """What a composition reserves for ``context`` tokens of each of ``sequences``; ``tail`` tokens of each may be
    tentative at once. ``known`` is what the methods know of the model, and ``streams`` says which heads of each layer
    stream."""

    def __init__(
        self,
        layouts: list[LayerLayout],
        composition: Composition,
        context: int,
        sequences: int,
        tail: int,
        known: Known,
        streams: list[list[bool]] | None = None,
    ) -> None:
        self.layouts = layouts
        self.composition = composition
        self.of_layers = [composition.of_layer(layer, known) for layer in range(len(layouts))]
        self.context = context
        self.sequences = sequences
        self.owners = range(len(layouts)) if known.owners is None else known.owners
        self.ahead = BLOCK + tail  # tokens between two moments at which some are let go of, and tentative ones behind
        self.streams = streams
        self.budget = "uniform" if composition.evictor is None else composition.evictor.budget
        self.ragged = self.budget == "adakv"
        self.file_bytes = 0
        self._before: LowerStore | None = None
        self.pools: dict[int, Pool] = {}  # of the first of the layers that have them in common
        self.sizes = [self._size(layer, kept) for layer, kept in enumerate(self._kept(context))]

    def limit(self, layer: int, tokens: int) -> int:
        """How many tokens each head of a layer keeps on average of so many that came; queries may see no more than a
        window."""
        window = self.layouts[layer].window
        kept = min(max(self._kept(tokens)[layer], 1), self.sizes[layer].kept)
        return kept if window is None else min(kept, window)

    def common(self, layer: int) -> list[int]:
        """The layers that take their pages from where a layer's are: itself, or all like it where a budget lets what
        each of them keeps follow the prompt."""
        by_prompt = self.pooled(layer) or (self.streaming(layer) and self.streams is None)
        if not by_prompt:
            return [layer]
        like = self.layouts[layer], self.of_layers[layer]
        return [each for each in sorted(set(self.owners)) if (self.layouts[each], self.of_layers[each]) == like]

    def pooled(self, layer: int) -> bool:
        """Whether the scores of tokens in all layers say how many a layer keeps."""
        return self.budget == "dynamickv" and self.layouts[layer].window is None

    def streaming(self, layer: int) -> bool:
        """Whether some heads of a layer keep everything, and others first and recent tokens."""
        return self.composition.streamer is not None and self.layouts[layer].window is None

    def selects(self, layer: int) -> bool:
        """Whether tokens that decode see only some of a layer."""
        selector, whole = self.of_layers[layer].selector, self._whole(layer)
        return selector is not None and len(whole) > 0 and selector.selects(layer, self.layouts[layer])

    def _whole(self, layer: int) -> list[int]:
        """The heads of a layer that do not stream, as far as that is known."""
        heads = range(self.layouts[layer].kv_heads)
        if self.streams is None or not self.streaming(layer):
            return list(heads)
        return [head for head in heads if not self.streams[layer][head]]

    def _kept(self, tokens: int) -> list[int]:
        """As :meth:`limit`, of all layers, and where no layer has a window."""
        evictor, own = self.composition.evictor, sorted(set(self.owners))
        if evictor is None:
            return [tokens] * len(self.layouts)
        keep = min(evictor.kept(tokens), tokens)
        of_layers = budgets.of_layers(evictor.budget, keep, len(own), sum(evictor.protected(keep)), tokens)
        of_owners = dict(zip(own, of_layers, strict=True))
        return [tokens if self._all_of_window(owner) else of_owners[owner] for owner in self.owners]

    def _all_of_window(self, layer: int) -> bool:
        """Whether a layer keeps what its window shows, whatever the evictor does elsewhere."""
        return isinstance(self.composition.evictor, Demoter | Grouper) and self.layouts[layer].window is not None

    def lower(
        self, layer: int, arena: Arena, dtype: torch.dtype, tokens: torch.Tensor, file: int, known: Known
    ) -> LowerStore | None:
        """The lower store of a layer, as :meth:`pages`, if its evictor has one."""
        evictor, layout = self.of_layers[layer].evictor, self.layouts[layer]
        if not isinstance(evictor, Demoter) or self._all_of_window(layer):
            return None
        most = self.context - self.sizes[layer].kept
        longest = self.context if self.ragged else max(most, PAGE)
        arguments = layout, most, longest, self.sequences, dtype, arena, tokens, file, self.file_bytes
        self._before = kept = evictor.store(self._before, *arguments)
        self.file_bytes = kept.end
        evictor.prepare(layer, kept, known)
        return kept

    def distant(
        self, layers: list[Pages], arena: Arena, dtype: torch.dtype, tokens: torch.Tensor, file: int, known: Known
    ) -> Distants | None:
        """What ``layers`` keep together, if the evictor has them do so."""
        evictor, composition, stores = self.composition.evictor, self.composition, []
        if not isinstance(evictor, Grouper):
            return None
        coding = AsCoded(composition.key_codec, composition.value_codec)
        for group in evictor.groups(self.layouts, known):
            most = self.context - self.sizes[group.layers[0]].kept
            common = coding, most, max(most, PAGE), self.sequences, dtype, arena, tokens, file, self.file_bytes
            stores.append(DistantStore(group, [self.layouts[layer] for layer in group.layers], *common))
            self.file_bytes = stores[-1].end
        return Distants(stores, layers, self.layouts)

    def _has_codes(self, layer: int) -> bool:
        c = self.of_layers[layer]
        return c.key_codec is not None or c.value_codec is not None or c.pruner is not None

    def _size(self, layer: int, kept: int) -> Sizes:
        layout, composition, layers = self.layouts[layer], self.of_layers[layer], len(self.common(layer))
        kept = min(kept, self.context, layout.window or kept)
        heads, tier, recent = layout.kv_heads, composition.tier, composition.recent
        ragged, more = self.ragged, self.ahead
        most = min(kept * (budgets.DYNAMIC_MOST if layers > 1 else 1), self.context)
        # Of all heads together; each has a page that is not full.
        whole = heads * (layers * (kept + more + PAGE - 1) // PAGE) + (heads if ragged else 0)
        if self.streaming(layer):
            of_heads = self._of_heads(layer)
            most, whole = max(of_heads), sum(-(-(tokens + more) // PAGE) for tokens in of_heads)
        table_pages = -(-(min(kept * heads if ragged else most, self.context) + more) // PAGE)
        if not self._has_codes(layer):
            in_memory = (
                whole if tier is None else heads * (-(-tier.resident // PAGE) + tier.step + -(-more // PAGE) + 1)
            )
            return Sizes(kept, most, table_pages, min(whole, layers * in_memory), 0)
        # What is not coded yet; and while pages change their kind, that of one head once more.
        dense = heads * -(-(recent + PAGE - 1 + more) // PAGE) + -(-recent // PAGE) + 1
        coded = whole if tier is None else heads * (max(-(-tier.resident // PAGE) - recent // PAGE, 0) + tier.step)
        return Sizes(kept, most, table_pages, min(layers * dense, whole + 1), min(whole, layers * coded))

    def _of_heads(self, layer: int) -> list[int]:
        """How many tokens the heads of the layers that have their pages in common keep, in any order."""
        streamer, layers, heads = self.composition.streamer, len(self.common(layer)), self.layouts[layer].kv_heads
        assert streamer is not None
        streams = [True] * (heads * streamer.lazy(layers)) if self.streams is None else self.streams[layer]
        short, count = min(streamer.short, self.context), sum(streams)
        return [short] * count + [self.context] * (layers * heads - count)

    def pages(self, index: int, arena: Arena, dtype: torch.dtype, tokens: torch.Tensor, file: int) -> Pages:
        """The pages of a layer, in ``arena`` and behind what other layers have in ``file`` (-1: there is none).

        Keys and values that are not coded are of ``dtype``; ``tokens`` (sequences,) says how many came of each.
        """
        layout, size, composition, sequences = (
            self.layouts[index],
            self.sizes[index],
            self.of_layers[index],
            self.sequences,
        )
        heads, as_they_are = layout.kv_heads, 8 * dtype.itemsize
        pruner, key, value = composition.pruner, composition.key_codec, composition.value_codec
        width = layout.key_dim if pruner is None else pruner.kept(layout.key_dim)
        key_codec, value_codec = (
            Codec(as_they_are, dim, of_keys) if coder is None else coder.codec(dim, of_keys, as_they_are)
            for coder, dim, of_keys in ((key, width, True), (value, layout.value_dim, False))
        )
        shared, listed = layout.shared, (sequences, heads, size.table_pages)
        first = self.common(index)[0]
        if first not in self.pools:
            self.pools[first] = self._pool(index, arena, dtype, key_codec, value_codec)
        pool = self.pools[first]
        positions = channels = bounds = bound_at = None
        if composition.evictor is not None or layout.window is not None:
            positions = numbers(arena, sequences, heads, size.table_pages * PAGE)
        if pruner is not None:
            channels = numbers(arena, sequences, heads, width)
        if composition.selector is not None and composition.selector.bounds and self.selects(index):
            whole, parts = self._whole(index), composition.selector.bounds
            bounds = place(arena, (sequences, len(whole), size.table_pages, parts, 2, layout.key_dim), dtype)
            if len(whole) < heads:
                bound_at = torch.full((heads,), -1, dtype=torch.int32)
                bound_at[whole] = torch.arange(len(whole), dtype=torch.int32)
        file = -1 if composition.tier is None else file
        keys_at = self.file_bytes
        values_at = keys_at + sequences * heads * size.table_pages * key_codec.page_bytes
        self.file_bytes = values_at + sequences * heads * size.table_pages * value_codec.page_bytes
        return Pages(
            pool.keys,
            pool.values,
            numbers(arena, *listed),
            lengths=numbers(arena, sequences, heads),
            coded=numbers(arena, sequences, heads),
            cold=numbers(arena, sequences, heads),
            bounded=numbers(arena, sequences, heads),
            dense_free=pool.dense_free,
            coded_free=pool.coded_free,
            tokens=tokens,
            key_codec=key_codec,
            value_codec=value_codec,
            coded_keys=pool.coded_keys,
            coded_values=pool.coded_values,
            positions=positions,
            channels=channels,
            bounds=bounds,
            bound_at=bound_at,
            file=file,
            keys_at=keys_at,
            values_at=values_at,
            key_side=table(arena, key_codec, sequences, heads),
            value_side=None if shared else table(arena, value_codec, sequences, heads),
        )

    def _pool(self, index: int, arena: Arena, dtype: torch.dtype, key_codec: Codec, value_codec: Codec) -> Pool:
        layout, size, sequences = self.layouts[index], self.sizes[index], self.sequences
        dense, coded = (sequences, size.dense_pages, PAGE), (sequences, size.coded_pages)
        keys = place(arena, (*dense, layout.key_dim), dtype)
        values = keys[..., : layout.value_dim] if layout.shared else place(arena, (*dense, layout.value_dim), dtype)
        coded_keys = coded_values = None
        if self._has_codes(index):
            coded_keys = place(arena, (*coded, key_codec.page_bytes), torch.uint8)
            coded_values = None if layout.shared else place(arena, (*coded, value_codec.page_bytes), torch.uint8)
        free = numbers(arena, sequences, 1 + size.dense_pages), numbers(arena, sequences, 1 + size.coded_pages)
        return Pool(keys, values, *free, coded_keys, coded_values)
