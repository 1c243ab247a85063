"""Heads of which everything stays, beside heads that keep first and recent tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import ops
from tightfit.kernels.pages import Pages, Run
from tightfit.kv.beside import Beside, Going
from tightfit.kv.lazy import Lazy
from tightfit.kv.method import Streamer
from tightfit.kv.reserved import Reserved

Keep = Callable[..., None]  # (layer, slot, run, ws, indices, counts): writes what stays


@dataclass
class Streaming:
    """What heads of layers without windows keep; ``keep`` writes it. What streaming heads let go of is taken up by
    what is ``beside`` their layers' pages."""

    streamer: Streamer
    layers: list[Pages]
    beside: list[list[Beside]]
    keep: Keep
    streams: list[list[bool]] | None  # of each layer which heads stream; None: the prompt says which layers do
    lazy: dict[int, Lazy] = field(default_factory=dict)

    def find(self, reserved: Reserved, sequences: int, arena: Arena) -> None:
        """Makes room for what prompts say of layers."""
        for layer in set(reserved.owners):
            if self.streams is None and reserved.streaming(layer) and layer not in self.lazy:
                layers = reserved.common(layer)
                lazy = Lazy(layers, self.streamer.lazy(len(layers)), sequences, arena)
                self.lazy |= dict.fromkeys(layers, lazy)

    def settle(self, layer: int, slot: int, run: Run, given: torch.Tensor | None, tokens: int, ws: Workspace) -> None:
        """The tokens of ``run`` are certain, ``tokens`` with those before; ``given`` (kv_heads, n) is what they
        received from the last queries of a prompt's chunk."""
        lazy = self.lazy.get(layer)
        if lazy is None:
            self._write(layer, slot, run, ws)
            return
        if ops.is_dry():
            with ws.frame():  # another layer may be found to be lazy
                self._write(layer, slot, Run(run.keys, run.values, 0), ws)
        else:
            if run.count and given is not None:
                lazy.note(layer, slot, self._ratio(given.sum(1)[:, :tokens]))
            new = lazy.find(slot, layer if run.count else None) if tokens > self.streamer.short else []
            for other in new:
                if other != layer:
                    with ws.frame():
                        self._write(other, slot, Run(run.keys, run.values, 0), ws)
        self._write(layer, slot, run, ws)

    def _ratio(self, given: torch.Tensor) -> float:
        """Of what tokens received, (kv_heads, n), the share of the first and the recent ones. Of a short prompt, where
        all would be recent, these are the last half."""
        count, sinks = given.shape[1], self.streamer.sinks
        recent = max(count - min(self.streamer.recent, count // 2), sinks)
        return float((given[:, :sinks].sum() + given[:, recent:].sum()) / given.sum())

    def _heads(self, layer: int, slot: int) -> list[bool]:
        """Which heads of a layer stream."""
        if self.streams is not None:
            return self.streams[layer]
        return [self.lazy[layer].has(layer, slot)] * self.layers[layer].table.shape[1]

    def _write(self, layer: int, slot: int, run: Run, ws: Workspace) -> None:
        """Keeps of a layer's tokens and those of the run what stays."""
        kept, sinks, short = self.layers[layer], self.streamer.sinks, self.streamer.short
        indices = ws.empty(kept.table.shape[1], short, dtype=torch.int32)
        if ops.is_dry():
            for each in self.beside[layer]:
                each.take_most(slot, kept, run, ws)
            self.keep(layer, slot, run, ws)
            return
        totals = [length + run.count for length in kept.lengths[slot].tolist()]
        counts = [-1] * len(totals)  # everything
        for head, (streams, total) in enumerate(zip(self._heads(layer, slot), totals, strict=True)):
            if streams and total > short:
                counts[head] = short
                indices[head, :sinks] = torch.arange(sinks)
                indices[head, sinks:] = torch.arange(total - self.streamer.recent, total)
        shape = len(totals), max(totals)
        unknown, seen = torch.zeros(1).expand(shape), torch.ones(1, dtype=torch.bool).expand(shape)
        for each in self.beside[layer]:  # nothing was observed of single tokens
            each.take(Going(slot, kept, run, indices, counts, unknown, seen), ws)
        self.keep(layer, slot, run, ws, indices, torch.tensor(counts, dtype=torch.int32))

    def clear(self, slot: int) -> None:
        for lazy in self.lazy.values():
            lazy.clear(slot)

    def parts(self, slot: int) -> Iterator[torch.Tensor]:
        """What has to be saved of a sequence, as flat uint8 tensors."""
        for lazy in dict.fromkeys(self.lazy.values()):
            yield from lazy.parts(slot)
