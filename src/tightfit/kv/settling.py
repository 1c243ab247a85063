"""What happens when tokens become certain: what is too much is let go of, merged, turned or handed on, and what stays
is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.errors import TightfitError
from tightfit.kernels import ops, pages
from tightfit.kernels.pages import PAGE, Run
from tightfit.kv import budgets
from tightfit.kv.beside import Going
from tightfit.kv.method import Seen
from tightfit.kv.select.selecting import Settled
from tightfit.kv.store import Store
from tightfit.kv.streaming import Streaming


class Settling:
    """What happens to the tokens of ``store``."""

    def __init__(self, store: Store, arena: Arena) -> None:
        self.store = store
        self.streaming: Streaming | None = None
        if store.composition.streamer is not None:
            of_layers = store.layers, store.beside, self.keep, store.streams
            self.streaming = Streaming(store.composition.streamer, *of_layers)
            self.streaming.find(store.reserved, store.sequences, arena)

    def clear(self, slot: int) -> None:
        if self.streaming is not None:
            self.streaming.clear(slot)

    def parts(self, slot: int) -> Iterator[torch.Tensor]:
        """What is kept of a sequence beside the store."""
        if self.streaming is not None:
            yield from self.streaming.parts(slot)

    def settle(
        self, layer: int, slot: int, run: Run, given: torch.Tensor | None, ws: Workspace, whole: bool = True
    ) -> None:
        """The tokens of ``run`` are certain: what is too much is let go, and what stays is written. ``whole`` says
        whether the prompt is."""
        store = self.store
        kept, selecting, heads = (
            store.layers[layer],
            store.selecting[layer],
            store.layouts[layer].kv_heads,
        )
        if self.streaming is not None and store.reserved.streaming(layer):
            self.streaming.settle(layer, slot, run, given, int(store.tokens[slot]) + run.count, ws)
            if selecting is not None:
                selecting.settled(slot, Settled(run.count, whole), ws)
            return
        if kept.positions is None or ops.is_dry():
            if kept.positions is not None:
                ws.empty(heads, kept.positions.shape[2] + run.count, dtype=torch.int32)
            if layer in store.pooled:
                self._let_go(layer, slot, torch.empty(heads, 0, dtype=torch.int32), ws)
            if store.turning:
                store.turning[layer].take_most(slot, run, ws)
            if store.merging:
                store.merging[layer].take_most(slot, run, ws)
            for each in store.beside[layer] if ops.is_dry() else ():
                each.take_most(slot, kept, run, ws)
            self.keep(layer, slot, run, ws)
            if selecting is not None:
                selecting.settled(slot, Settled(run.count, whole), ws)
            return
        now, evictor = Settled(run.count, whole), store.composition.evictor
        before = kept.lengths[slot].tolist()
        counts = [length + run.count for length in before]
        tokens = int(store.tokens[slot]) + run.count
        limit = store.reserved.limit(layer, tokens)
        positions = ws.empty(heads, kept.positions.shape[2] + run.count, dtype=torch.int32)
        for head, length in enumerate(before):
            positions[head, :length] = kept.positions[slot, head, :length]
            positions[head, length : length + run.count] = torch.arange(tokens - run.count, tokens)
        if store.observed is not None and given is not None:
            store.observed.recall(layer, slot, given, before, tokens, run.count)
        window = store.layouts[layer].window
        # The next query stands at `tokens`, and sees itself too.
        oldest = min((int(positions[head, 0]) for head in range(heads) if counts[head]), default=tokens)
        too_old = window is not None and oldest <= tokens - window
        too_many = sum(counts) > limit * heads if store.reserved.ragged else max(counts) > limit
        if too_old or too_many or layer in store.pooled or (evictor is not None and evictor.selective):
            alike = store.merging[layer].compare(slot, run, counts, ws) if store.merging else None
            mass, lately, since = torch.zeros(positions.shape), None, 0
            if store.observed is not None and given is not None:
                mass, lately, since = store.observed.judged(slot, given, tokens, run.count)
            prompt = tokens if run.count else int(store.prompts[slot])
            seen = self._seen(layer, slot, positions, counts, (since, tokens, prompt, limit), (mass, lately, alike))
            indices, left = (
                self._judge(layer, seen) if layer not in store.pooled else self._share(layer, slot, seen, ws)
            )
            listed = indices
            going = Going(slot, kept, run, indices, left, seen.mass, positions > seen.horizon)
            with self._writing():
                for each in store.beside[layer]:  # what no query sees any more does not count any more
                    each.take(going, ws)
            if store.merging:
                listed = store.merging[layer].merge(slot, run, (indices, left), seen, ws)
                run = Run(run.keys, run.values, run.keys.shape[1])
            if store.turning:
                listed = store.turning[layer].turn(slot, run, indices, left, ws)
                run = Run(run.keys, run.values, run.keys.shape[1])
            if left != counts:
                now = Settled(now.count, whole, indices, left)
            counts = left
            self.keep(layer, slot, run, ws, listed, torch.tensor(counts, dtype=torch.int32))
            gather = indices.long().clamp(max=positions.shape[1] - 1)
            positions[:, : indices.shape[1]] = positions.gather(1, gather)
            if given is not None:
                for block in given.unbind(1):
                    block[:, : indices.shape[1]] = block.gather(1, gather)
        else:
            self.keep(layer, slot, run, ws)
        ahead = torch.arange(tokens, tokens + store.reserved.ahead)
        for head, length in enumerate(counts):
            kept.positions[slot, head, :length] = positions[head, :length]
            kept.positions[slot, head, length : length + len(ahead)] = ahead  # where the next tokens will be
        if store.observed is not None and given is not None:
            store.observed.keep(layer, slot, given, counts)
        if selecting is not None:
            selecting.settled(slot, now, ws)

    def _let_go(self, layer: int, slot: int, indices: torch.Tensor, ws: Workspace) -> None:
        """Of a layer's certain tokens those at ``indices`` (kv_heads, n) int32 stay, whose turn it is not: what else it
        has of them, and room for what comes, stays with them."""
        store = self.store
        kept, (heads, count) = store.layers[layer], indices.shape
        assert kept.positions is not None
        with ws.frame():
            positions = ws.empty(heads, kept.positions.shape[2], dtype=torch.int32)
            run = self.new_run(layer, 0, ws)
            if ops.is_dry():
                for each in store.beside[layer]:
                    each.take_most(slot, kept, run, ws)
                self.keep(layer, slot, run, ws)
                return
            length, counts = int(kept.lengths[slot, 0]), [count] * heads
            behind = store.reserved.ahead - (length - store.pooled[layer].of(layer, slot).shape[1])
            positions.copy_(kept.positions[slot])
            going = Going(slot, kept, run, indices, counts, torch.zeros(positions.shape), positions >= 0)
            with self._writing():
                for each in store.beside[layer]:
                    each.take(going, ws)
            self.keep(layer, slot, run, ws, indices, torch.tensor(counts, dtype=torch.int32), behind)
            places = indices.long()
            kept.positions[slot, :, :count] = positions.gather(1, places)
            kept.positions[slot, :, count : count + behind] = positions[:, length : length + behind]
            if store.observed is not None:
                store.observed.let_go(layer, slot, places)

    def keep(
        self,
        layer: int,
        slot: int,
        run: Run,
        ws: Workspace,
        indices: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        ahead: int | None = None,
    ) -> None:
        """:func:`tightfit.kernels.pages.keep`, with room for ``ahead`` more tokens."""
        store = self.store
        composition = store.reserved.of_layers[layer]
        tier, recent = composition.tier, composition.recent
        resident, step = (pages.EVERYTHING, 1) if tier is None else (tier.resident // PAGE, tier.step)
        ahead = store.reserved.ahead if ahead is None else ahead
        with self._writing():
            pages.keep(store.layers[layer], slot, run, ws, indices, counts, recent, resident, ahead, step)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Says what to do where a disk is full."""
        try:
            yield
        except RuntimeError as error:
            tier = self.store.composition.tier
            if tier is None:
                raise
            hint = f"Make room on it, or name a folder on another: {tier.name}(folder=...)."
            raise TightfitError(str(error), hint) from error

    def rehearse(self, count: int) -> None:
        """Judges as many tokens as a chunk of ``count`` makes at most, once."""
        store = self.store
        for layer, layout in enumerate(store.layouts):
            kept = store.layers[layer].positions
            if kept is None:
                continue
            width = kept.shape[2] + count
            mass = torch.zeros(layout.kv_heads, width)
            positions = torch.arange(width, dtype=torch.int32).clamp(max=store.context - 1).repeat(layout.kv_heads, 1)
            limit = store.reserved.limit(layer, width)
            counts = [width] * layout.kv_heads
            arrays = mass, mass.clone(), torch.zeros(positions.shape)
            seen = self._seen(layer, 0, positions, counts, (0, width, width, limit), arrays)
            if layer in store.pooled:
                store.pooled[layer].rehearse(layer, self._scores(layer, seen), limit, store.reserved.sizes[layer].most)
            self._judge(layer, seen)

    def new_run(self, layer: int, count: int, ws: Workspace) -> Run:
        """Room in scratch memory for the keys and values of ``count`` tokens, and of those that merging changes."""
        store = self.store
        layout = store.layouts[layer]
        more = store.reserved.sizes[layer].table_pages * PAGE if store.merging or store.turning else 0
        slots = max(count, 1) + more
        keys = ws.empty(layout.kv_heads, slots, layout.key_dim, dtype=store.dtype)
        if layout.shared:
            return Run(keys, keys[..., : layout.value_dim], count)
        return Run(keys, ws.empty(layout.kv_heads, slots, layout.value_dim, dtype=store.dtype), count)

    def _seen(
        self,
        layer: int,
        slot: int,
        positions: torch.Tensor,
        counts: list[int],
        numbers: tuple[int, int, int, int],
        arrays: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    ) -> Seen:
        """What a layer's tokens are judged by; ``numbers``: where the queries that judge begin, and how many tokens
        came, came with prompts, and stay; ``arrays``: ``mass``, ``lately`` and ``alike``."""
        store = self.store
        (since, tokens, prompt, limit), layout, width = numbers, store.layouts[layer], max(counts)
        positions = positions[:, :width]
        groups = layout.heads // layout.kv_heads * store.owners.count(layer)
        horizon = -1 if layout.window is None else tokens - layout.window
        mass, lately, alike = (None if array is None else array[:, :width] for array in arrays)
        assert mass is not None
        read = None if store.reading is None else store.reading.seen(slot, tokens)
        return Seen(mass, positions, counts, groups, since, tokens, prompt, limit, horizon, lately, alike, read)

    def _judge(self, layer: int, seen: Seen) -> tuple[torch.Tensor, list[int]]:
        """Which of a layer's tokens stay: indices (kv_heads, n) int32, ascending, and how many for each head."""
        indices, kept = budgets.choose(self._scores(layer, seen), seen.counts, seen.keep, self.store.reserved.budget)
        return indices, kept.tolist()

    def _share(self, layer: int, slot: int, seen: Seen, ws: Workspace) -> tuple[torch.Tensor, list[int]]:
        """:meth:`_judge` where layers share what they keep: the others let go of what scores less."""
        store = self.store
        pooled, heads = store.pooled[layer], len(seen.counts)
        scores = self._scores(layer, seen)
        share = pooled.share(layer, slot, scores, seen.keep, store.reserved.sizes[layer].most)
        for other, keep in share.items():
            of_other = pooled.of(other, slot)
            if other == layer or keep == of_other.shape[1]:
                continue
            # Behind those that were judged are others, whose turn comes; they stay.
            waiting = int(store.layers[other].lengths[slot, 0]) - of_other.shape[1]
            places, _ = budgets.choose(of_other, [of_other.shape[1]] * heads, keep, "uniform")
            behind = torch.arange(waiting, dtype=torch.int32) + of_other.shape[1]
            self._let_go(other, slot, torch.cat([places, behind.expand(heads, -1)], 1).contiguous(), ws)
            pooled.note(other, slot, of_other.gather(1, places.long()))
        indices, kept = budgets.choose(scores, seen.counts, share[layer], "uniform")
        pooled.note(layer, slot, scores.gather(1, indices.long()))
        return indices, kept.tolist()

    def _scores(self, layer: int, seen: Seen) -> torch.Tensor:
        """How much tokens (kv_heads, n) are worth keeping: infinite where they stay in any case, minus infinite where
        they go. Where layers share what they keep, scores are shares of what the layer's tokens received."""
        store = self.store
        evictor, window = store.composition.evictor, store.layouts[layer].window
        if evictor is None:
            scores = seen.positions.float()
        else:
            if layer in store.pooled:
                seen = replace(seen, mass=seen.mass / seen.mass.sum().clamp(min=torch.finfo().tiny))
            scores = evictor.scores(seen).clone()  # what it was given is left to mergers
            first, last = evictor.protected(seen.keep)
            if window is not None:  # which hides the first tokens sooner or later
                first, last = 0, first + last
            for head, count in enumerate(seen.counts):
                scores[head, : min(first, count)] = torch.inf
                scores[head, max(count - last, 0) : count] = torch.inf
        return scores.masked_fill(seen.positions <= seen.horizon, -torch.inf)
