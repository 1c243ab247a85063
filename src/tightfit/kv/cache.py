"""Keys and values of a fixed number of sequences, kept as they are.

Storage is one run of slots for each sequence and layer, mapped once. A layer with a sliding window keeps only as many
tokens as its window and one chunk need, as a ring. Latent attention keeps one latent for each token, and its values
are a view of its keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.errors import UsageError
from tightfit.kernels import attention, ops
from tightfit.kernels.attention import KeysValues, Scoring
from tightfit.kernels.codec import Codec
from tightfit.kv.base import BaseCache, LayerLayout, Move, Step, Turn, Turned, before, check_alone


class Cache(BaseCache):
    """Everything that was seen, in ``dtype``; ``chunk`` tokens are added at once, at most. Layers whose ``owners`` are
    others keep nothing."""

    def __init__(
        self,
        layouts: list[LayerLayout],
        sequences: int,
        dtype: torch.dtype,
        arena: Arena,
        gemm_dtype: torch.dtype = torch.float32,
        chunk: int = 1,
        owners: Sequence[int] | None = None,
    ) -> None:
        self.layouts = layouts
        self.owners = list(range(len(layouts)) if owners is None else owners)
        self.sequences = sequences
        self.gemm_dtype = gemm_dtype
        self.chunk = chunk
        self.tokens = [0] * sequences
        made: dict[int, KeysValues] = {}
        for index in self.own:
            layout = layouts[index]
            shape = (sequences, layout.kv_heads, layout.slots)
            keys = place(arena, (*shape, layout.key_dim), dtype)
            shared = keys[..., : layout.value_dim]
            made[index] = KeysValues(keys, shared if layout.shared else place(arena, (*shape, layout.value_dim), dtype))
        self.layers = [made[owner] for owner in self.owners]

    def update(
        self,
        layer: int,
        step: Step,
        q_: torch.Tensor | None,
        k_: torch.Tensor | None,
        v: torch.Tensor | None,
        turn: Turn | Turned | None,
        ws: Workspace,
    ) -> None:
        if k_ is None:
            if turn is not None and q_ is not None:
                turn.apply(q_, None, False, ws)
            return
        if not isinstance(turn, Turn) or q_ is None or v is None:
            attention.append(self.layers[layer], step.places, k_, v)
            return
        cos, sin = turn.tables
        attention.rotate_append(self.layers[layer], step.places, q_, k_, v, cos, sin, turn.interleaved, ws)

    def attend_step(
        self, layer: int, step: Step, held: None, q: torch.Tensor, out: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        kept, rows, bf16 = self.layers[self.owners[layer]], step.vector, self.gemm_dtype == torch.bfloat16
        past, places = self.layouts[layer].past, step.places
        with ws.frame():
            if past:
                check_alone(step)
                scoring, places = before(scoring), ws.empty(rows, 2, dtype=torch.int32)
                ops.places_before(step.places[:rows], places)
            if rows:
                trees = None if step.paths is None else (step.paths, step.committed)
                attention.attend_rows(kept, places, q[:rows], out[:rows], ws, scoring, trees)
        for segment, a, b in step.prefills:
            start = segment.start - past
            if start < 0:  # the first token sees nothing
                ops.zero_(out[a : a + 1])
                start, a = 0, a + 1
            if a < b:
                attention.attend(kept, segment.slot, start, q[a:b], out[a:b], ws, scoring, bf16)

    @contextmanager
    def through(self, step: Step, ws: Workspace) -> Iterator[None]:
        for layer in self.awaited:
            layout = self.layouts[layer]
            for _, a, b in step.prefills:
                with ws.frame():
                    k, v = (ws.empty(b - a, layout.kv_heads, dim) for dim in (layout.key_dim, layout.value_dim))
                    ops.zero_(k)
                    ops.zero_(v)
                    attention.append(self.layers[layer], step.places[a:b], k, v)
        yield

    @contextmanager
    def whole(self, layer: int, segment: Any, ws: Workspace) -> Iterator[None]:
        if self.awaited or (len(self.own) < len(self.owners) and any(layout.window for layout in self.layouts)):
            raise UsageError(
                "layers that read what others keep of a window, or later ones, are computed chunk by chunk",
                "Leave --prefill layered out.",
            )
        yield

    def begin(self, slot: int, start: int) -> None:
        self.tokens[slot] = start

    def prefilled(self, slot: int, start: int, stop: int) -> None:
        self.tokens[slot] = stop

    def commit(self, slot: int, path: Sequence[int], ws: Workspace) -> None:
        start = self.tokens[slot]
        for place, order in enumerate(path):
            if place != order:
                for layer in self.own:
                    attention.move(self.layers[layer], slot, start + order, start + place)
        self.tokens[slot] += len(path)

    def room(self, slot: int) -> int:
        """A ring holds a chunk beside its window; what reads a later layer needs the token before."""
        if any(layout.past for layout in self.layouts):
            return 1
        return self.chunk if any(layout.window for layout in self.layouts) else 1 << 30

    def reusable(self, slot: int, common: int) -> int:
        """A ring that has wrapped can only go back by one chunk."""
        cached = self.tokens[slot]
        wrapped = any(layout.slots < cached for layout in self.layouts)
        return 0 if wrapped and cached - common > self.chunk else common

    def largest_entry(self, chunk: int) -> int:
        return sum(part.nbytes for part in self._parts(0, 0, chunk))

    def entry_nbytes(self, slot: int, start: int, stop: int) -> int:
        overwritten = any(layout.slots < self.tokens[slot] - start for layout in self.layouts)
        return 0 if overwritten else sum(part.nbytes for part in self._parts(slot, start, stop))

    def save(self, slot: int, start: int, stop: int, put: Move) -> None:
        for part in self._parts(slot, start, stop):
            put(part)

    def restore(self, slot: int, start: int, stop: int, get: Move) -> None:
        for part in self._parts(slot, start, stop):
            get(part)
        self.tokens[slot] = stop

    def _parts(self, slot: int, start: int, stop: int) -> Iterator[torch.Tensor]:
        """The bytes of some tokens in all layers, as flat uint8 tensors."""
        for layer in self.own:
            layout, kept = self.layouts[layer], self.layers[layer]
            first = start % layout.slots
            last = first + stop - start
            pieces = [(first, min(last, layout.slots)), (0, last - layout.slots)]  # a ring may go round
            for stored in (kept.keys,) if layout.shared else (kept.keys, kept.values):
                for head in stored[slot]:
                    for a, b in pieces:
                        if b > a:
                            yield as_bytes(head[a:b])


def place(arena: Arena, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in the next bytes of ``arena``."""
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    return arena.take(nbytes).view(dtype).view(shape)


def placed(x: torch.Tensor, arena: Arena) -> torch.Tensor:
    """A copy in the next bytes of ``arena``."""
    copy = place(arena, tuple(x.shape), x.dtype)
    copy.copy_(x)
    return copy


def numbers(arena: Arena, *shape: int) -> torch.Tensor:
    """Room for int32 numbers."""
    return place(arena, shape, torch.int32)


def table(arena: Arena, codec: Codec, sequences: int, kv_heads: int) -> torch.Tensor | None:
    """Room for the table of a codec, if it has one: for each sequence, or for all where it was fitted."""
    shape = 1 if codec.coupled else sequences, kv_heads, codec.side
    return place(arena, shape, torch.float32) if codec.side else None


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor without gaps, flat."""
    return x.view(-1).view(torch.uint8)


def window_slots(context: int, window: int | None, chunk: int) -> int:
    """Tokens that a layer must keep: all, or its window and the chunk that is being added."""
    return context if window is None else min(context, window - 1 + chunk)
