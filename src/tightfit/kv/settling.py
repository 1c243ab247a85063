"""What happens when tokens become certain: what is too much is let go of, merged, turned or handed on, and what stays
is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from tightfit.budget.ledger import Workspace
from tightfit.errors import TightfitError
from tightfit.kernels import ops, pages
from tightfit.kernels.pages import PAGE, Pages, Run
from tightfit.kv import budgets
from tightfit.kv.base import LayerLayout
from tightfit.kv.beside import Beside, Going
from tightfit.kv.compose import Composition
from tightfit.kv.merge.merging import Merging
from tightfit.kv.method import Seen
from tightfit.kv.observed import Observed
from tightfit.kv.pooled import Pooled
from tightfit.kv.reading import Reading
from tightfit.kv.reserved import Reserved
from tightfit.kv.select.selecting import Selecting, Settled
from tightfit.kv.streaming import Streaming
from tightfit.kv.turning import Turning


@dataclass
class Settling:
    """The parts of a cache that have to do with it, lists with one of each layer: ``layers`` are the pages, ``tokens``
    and ``prompts`` (sequences,) int32 say how many tokens came of each sequence, and how many with its prompt."""

    composition: Composition
    reserved: Reserved
    layouts: Sequence[LayerLayout]
    owners: Sequence[int]
    context: int
    dtype: torch.dtype
    tokens: torch.Tensor
    prompts: torch.Tensor
    layers: Sequence[Pages]
    beside: Sequence[Sequence[Beside]]
    selecting: Sequence[Selecting | None]
    merging: Sequence[Merging]
    turning: Sequence[Turning]
    pooled: Mapping[int, Pooled]
    observed: Observed | None
    reading: Reading | None
    streaming: Streaming | None = None

    def settle(
        self, layer: int, slot: int, run: Run, given: torch.Tensor | None, ws: Workspace, whole: bool = True
    ) -> None:
        """The tokens of ``run`` are certain: what is too much is let go, and what stays is written. ``whole`` says
        whether the prompt is."""
        kept, selecting, heads = self.layers[layer], self.selecting[layer], self.layouts[layer].kv_heads
        if self.streaming is not None and self.reserved.streaming(layer):
            self.streaming.settle(layer, slot, run, given, int(self.tokens[slot]) + run.count, ws)
            if selecting is not None:
                selecting.settled(slot, Settled(run.count, whole), ws)
            return
        if kept.positions is None or ops.is_dry():
            if kept.positions is not None:
                ws.empty(heads, kept.positions.shape[2] + run.count, dtype=torch.int32)
            if layer in self.pooled:
                self._let_go(layer, slot, torch.empty(heads, 0, dtype=torch.int32), ws)
            if self.turning:
                self.turning[layer].take_most(slot, run, ws)
            if self.merging:
                self.merging[layer].take_most(slot, run, ws)
            for each in self.beside[layer] if ops.is_dry() else ():
                each.take_most(slot, kept, run, ws)
            self.keep(layer, slot, run, ws)
            if selecting is not None:
                selecting.settled(slot, Settled(run.count, whole), ws)
            return
        now, evictor = Settled(run.count, whole), self.composition.evictor
        before = kept.lengths[slot].tolist()
        counts = [length + run.count for length in before]
        tokens = int(self.tokens[slot]) + run.count
        limit = self.reserved.limit(layer, tokens)
        positions = ws.empty(heads, kept.positions.shape[2] + run.count, dtype=torch.int32)
        for head, length in enumerate(before):
            positions[head, :length] = kept.positions[slot, head, :length]
            positions[head, length : length + run.count] = torch.arange(tokens - run.count, tokens)
        if self.observed is not None and given is not None:
            self.observed.recall(layer, slot, given, before, tokens, run.count)
        window = self.layouts[layer].window
        # The next query stands at `tokens`, and sees itself too.
        oldest = min((int(positions[head, 0]) for head in range(heads) if counts[head]), default=tokens)
        too_old = window is not None and oldest <= tokens - window
        too_many = sum(counts) > limit * heads if self.reserved.ragged else max(counts) > limit
        if too_old or too_many or layer in self.pooled or (evictor is not None and evictor.selective):
            alike = self.merging[layer].compare(slot, run, counts, ws) if self.merging else None
            mass, lately, since = torch.zeros(positions.shape), None, 0
            if self.observed is not None and given is not None:
                mass, lately, since = self.observed.judged(slot, given, tokens, run.count)
            prompt = tokens if run.count else int(self.prompts[slot])
            seen = self._seen(layer, slot, positions, counts, (since, tokens, prompt, limit), (mass, lately, alike))
            indices, left = self._judge(layer, seen) if layer not in self.pooled else self._share(layer, slot, seen, ws)
            listed = indices
            going = Going(slot, kept, run, indices, left, seen.mass, positions > seen.horizon)
            with self._writing():
                for each in self.beside[layer]:  # what no query sees any more does not count any more
                    each.take(going, ws)
            if self.merging:
                listed = self.merging[layer].merge(slot, run, (indices, left), seen, ws)
                run = Run(run.keys, run.values, run.keys.shape[1])
            if self.turning:
                listed = self.turning[layer].turn(slot, run, indices, left, ws)
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
        ahead = torch.arange(tokens, tokens + self.reserved.ahead)
        for head, length in enumerate(counts):
            kept.positions[slot, head, :length] = positions[head, :length]
            kept.positions[slot, head, length : length + len(ahead)] = ahead  # where the next tokens will be
        if self.observed is not None and given is not None:
            self.observed.keep(layer, slot, given, counts)
        if selecting is not None:
            selecting.settled(slot, now, ws)

    def _let_go(self, layer: int, slot: int, indices: torch.Tensor, ws: Workspace) -> None:
        """Of a layer's certain tokens those at ``indices`` (kv_heads, n) int32 stay, whose turn it is not: what else it
        has of them, and room for what comes, stays with them."""
        kept, (heads, count) = self.layers[layer], indices.shape
        assert kept.positions is not None
        with ws.frame():
            positions = ws.empty(heads, kept.positions.shape[2], dtype=torch.int32)
            run = self.new_run(layer, 0, ws)
            if ops.is_dry():
                for each in self.beside[layer]:
                    each.take_most(slot, kept, run, ws)
                self.keep(layer, slot, run, ws)
                return
            length, counts = int(kept.lengths[slot, 0]), [count] * heads
            behind = self.reserved.ahead - (length - self.pooled[layer].of(layer, slot).shape[1])
            positions.copy_(kept.positions[slot])
            going = Going(slot, kept, run, indices, counts, torch.zeros(positions.shape), positions >= 0)
            with self._writing():
                for each in self.beside[layer]:
                    each.take(going, ws)
            self.keep(layer, slot, run, ws, indices, torch.tensor(counts, dtype=torch.int32), behind)
            places = indices.long()
            kept.positions[slot, :, :count] = positions.gather(1, places)
            kept.positions[slot, :, count : count + behind] = positions[:, length : length + behind]
            if self.observed is not None:
                self.observed.let_go(layer, slot, places)

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
        composition = self.reserved.of_layers[layer]
        tier, recent = composition.tier, composition.recent
        resident, step = (pages.EVERYTHING, 1) if tier is None else (tier.resident // PAGE, tier.step)
        ahead = self.reserved.ahead if ahead is None else ahead
        with self._writing():
            pages.keep(self.layers[layer], slot, run, ws, indices, counts, recent, resident, ahead, step)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Says what to do where a disk is full."""
        try:
            yield
        except RuntimeError as error:
            tier = self.composition.tier
            if tier is None:
                raise
            hint = f"Make room on it, or name a folder on another: {tier.name}(folder=...)."
            raise TightfitError(str(error), hint) from error

    def rehearse(self, count: int) -> None:
        """Judges as many tokens as a chunk of ``count`` makes at most, once."""
        for layer, layout in enumerate(self.layouts):
            kept = self.layers[layer].positions
            if kept is None:
                continue
            width = kept.shape[2] + count
            mass = torch.zeros(layout.kv_heads, width)
            positions = torch.arange(width, dtype=torch.int32).clamp(max=self.context - 1).repeat(layout.kv_heads, 1)
            limit = self.reserved.limit(layer, width)
            counts = [width] * layout.kv_heads
            arrays = mass, mass.clone(), torch.zeros(positions.shape)
            seen = self._seen(layer, 0, positions, counts, (0, width, width, limit), arrays)
            if layer in self.pooled:
                self.pooled[layer].rehearse(layer, self._scores(layer, seen), limit, self.reserved.sizes[layer].most)
            self._judge(layer, seen)

    def new_run(self, layer: int, count: int, ws: Workspace) -> Run:
        """Room in scratch memory for the keys and values of ``count`` tokens, and of those that merging changes."""
        layout = self.layouts[layer]
        more = self.reserved.sizes[layer].table_pages * PAGE if self.merging or self.turning else 0
        slots = max(count, 1) + more
        keys = ws.empty(layout.kv_heads, slots, layout.key_dim, dtype=self.dtype)
        if layout.shared:
            return Run(keys, keys[..., : layout.value_dim], count)
        return Run(keys, ws.empty(layout.kv_heads, slots, layout.value_dim, dtype=self.dtype), count)

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
        (since, tokens, prompt, limit), layout, width = numbers, self.layouts[layer], max(counts)
        positions = positions[:, :width]
        groups = layout.heads // layout.kv_heads * self.owners.count(layer)
        horizon = -1 if layout.window is None else tokens - layout.window
        mass, lately, alike = (None if array is None else array[:, :width] for array in arrays)
        assert mass is not None
        read = None if self.reading is None else self.reading.seen(slot, tokens)
        return Seen(mass, positions, counts, groups, since, tokens, prompt, limit, horizon, lately, alike, read)

    def _judge(self, layer: int, seen: Seen) -> tuple[torch.Tensor, list[int]]:
        """Which of a layer's tokens stay: indices (kv_heads, n) int32, ascending, and how many for each head."""
        indices, kept = budgets.choose(self._scores(layer, seen), seen.counts, seen.keep, self.reserved.budget)
        return indices, kept.tolist()

    def _share(self, layer: int, slot: int, seen: Seen, ws: Workspace) -> tuple[torch.Tensor, list[int]]:
        """:meth:`_judge` where layers share what they keep: the others let go of what scores less."""
        pooled, heads = self.pooled[layer], len(seen.counts)
        scores = self._scores(layer, seen)
        share = pooled.share(layer, slot, scores, seen.keep, self.reserved.sizes[layer].most)
        for other, keep in share.items():
            of_other = pooled.of(other, slot)
            if other == layer or keep == of_other.shape[1]:
                continue
            # Behind those that were judged are others, whose turn comes; they stay.
            waiting = int(self.layers[other].lengths[slot, 0]) - of_other.shape[1]
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
        evictor, window = self.composition.evictor, self.layouts[layer].window
        if evictor is None:
            scores = seen.positions.float()
        else:
            if layer in self.pooled:
                seen = replace(seen, mass=seen.mass / seen.mass.sum().clamp(min=torch.finfo().tiny))
            scores = evictor.scores(seen).clone()  # what it was given is left to mergers
            first, last = evictor.protected(seen.keep)
            if window is not None:  # which hides the first tokens sooner or later
                first, last = 0, first + last
            for head, count in enumerate(seen.counts):
                scores[head, : min(first, count)] = torch.inf
                scores[head, max(count - last, 0) : count] = torch.inf
        return scores.masked_fill(seen.positions <= seen.horizon, -torch.inf)
