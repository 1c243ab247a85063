"""Keys and values with fewer features or heads than the model's, in whatever cache the rest of a composition makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import ops
from tightfit.kernels.attention import Scoring
from tightfit.kernels.matmul import matmul
from tightfit.kernels.weight import Weight
from tightfit.kv.base import BaseCache, LayerLayout, Move, Step, Turn, Turned
from tightfit.kv.cache import place


@dataclass(frozen=True)
class Maps:
    """How one layer's keys and values are stored: linear maps, float32, of each of its key-value heads.

    Keys are stored as ``keys @ k`` with ``keys`` (kv_heads, key_rank, key_dim), and looked at by ``queries @ q`` of the
    same shape; values as ``values @ v`` (kv_heads, value_rank, value_dim), and what attention gives of these becomes
    ``outputs @ out + shift`` with ``outputs`` (kv_heads, value_dim, value_rank) and ``shift`` (kv_heads, value_dim).
    Each ``merged`` neighbouring heads are stored as one, the sum of what they give. ``keys`` and ``queries`` may be the
    same tensor.
    """

    keys: torch.Tensor
    queries: torch.Tensor
    values: torch.Tensor
    outputs: torch.Tensor
    shift: torch.Tensor
    merged: int = 1

    def stored(self, layout: LayerLayout) -> LayerLayout:
        """What is kept of a layer that has ``layout``."""
        heads, key_rank, _ = self.keys.shape
        return replace(layout, kv_heads=heads // self.merged, key_dim=key_rank, value_dim=self.values.shape[1])


class _Placed(NamedTuple):
    """:class:`Maps` in an arena, as matrices to multiply with."""

    keys: list[Weight]
    queries: list[Weight]
    values: list[Weight]
    outputs: list[Weight]
    shift: torch.Tensor  # (heads * value_dim,)
    merged: int


@dataclass(frozen=True)
class _Rows:
    """Which tokens of a step go through the vector kernel, and which through one product each."""

    vector: int
    gemm: list[tuple[int, int]]


class _Held(NamedTuple):
    inner: Any
    q: torch.Tensor  # (n, heads, key_rank)


class Features(BaseCache):
    """The cache ``inner`` of what ``maps`` make of each layer's keys and values.

    Queries and keys are turned first, so that what is stored is never turned again, and the inner cache sees queries,
    keys and values like any others, of its own shapes. The maps of layers that have their own keys and values are
    copied into ``arena``.
    """

    def __init__(self, inner: BaseCache, layouts: Sequence[LayerLayout], maps: Sequence[Maps], arena: Arena) -> None:
        self.inner = inner
        self.layouts = list(layouts)
        self.sequences = inner.sequences
        self.gemm_dtype = inner.gemm_dtype
        self.anchors = inner.anchors
        self.whole_entries = inner.whole_entries
        placed = {layer: _place(maps[layer], layouts[layer], arena) for layer in inner.own}
        self._maps = [placed[owner] for owner in inner.owners]

    @property
    def owners(self) -> list[int]:  # type: ignore[override]
        return self.inner.owners

    @property
    def stored(self) -> BaseCache:
        return self.inner.stored

    # ---- a step ----

    def anchor_positions(self, positions: torch.Tensor) -> torch.Tensor:
        return self.inner.anchor_positions(positions)

    @contextmanager
    def through(self, step: Step, ws: Workspace) -> Iterator[None]:
        with self.inner.through(step, ws):
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
    ) -> _Held:
        if q_ is None:
            raise ValueError("queries must be there when keys are added: they are projected with them")
        maps, count, turned = self._maps[layer], q_.shape[0], None
        anchor_q = None if turn is None else turn.apply(q_, k_, True, ws)
        if anchor_q is not None:
            turned = Turned(self._queries(maps, anchor_q, step, ws))
        q = self._queries(maps, q_, step, ws)
        if k_ is None or v is None:
            return _Held(self.inner.update(layer, step, q, None, None, turned, ws), q)
        heads = k_.shape[1] // maps.merged
        k = ws.empty(count, heads, maps.keys[0].rows)
        values = ws.empty(count, heads, maps.values[0].rows)
        self._multiply(k_, maps.keys, k, step, ws, maps.merged)
        self._multiply(v, maps.values, values, step, ws, maps.merged)
        return _Held(self.inner.update(layer, step, q, k, values, turned, ws), q)

    def attend_step(
        self, layer: int, step: Step, held: _Held, q: torch.Tensor, out: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        maps = self._maps[layer]
        with ws.frame():
            attended = ws.empty(*out.shape[:2], maps.outputs[0].cols)
            self.inner.attend_step(layer, step, held.inner, held.q, attended, ws, scoring)
            self._multiply(attended, maps.outputs, out, step, ws)
            ops.add_(out.view(out.shape[0], -1), maps.shift)

    def _queries(self, maps: _Placed, q: torch.Tensor, step: Step, ws: Workspace) -> torch.Tensor:
        projected = ws.empty(*q.shape[:2], maps.queries[0].rows)
        self._multiply(q, maps.queries, projected, step, ws)
        return projected

    def _multiply(
        self, x: torch.Tensor, matrices: list[Weight], out: torch.Tensor, step: Step, ws: Workspace, merged: int = 1
    ) -> None:
        """``x`` (n, heads, cols) times the matrices of their key-value heads, into ``out`` (n, heads / merged, rows):
        the sum of each ``merged`` heads."""
        tokens, heads, _ = x.shape
        group = heads // len(matrices)
        rows = _Rows(step.vector, [(a, b) for _, a, b in step.prefills])
        if tokens == rows.vector == 1 and merged == 1:  # heads of one matrix are rows like those of other tokens
            for index, matrix in enumerate(matrices):
                part = slice(index * group, (index + 1) * group)
                matmul(x[0, part], matrix, out[0, part], ws, None, self.gemm_dtype, "float32", 0.0)
            return
        for head in range(heads):
            matrix, sum_up = matrices[head // group], 1.0 if head % merged else 0.0
            matmul(x[:, head], matrix, out[:, head // merged], ws, rows, self.gemm_dtype, "float32", sum_up)

    # ---- the rest is the inner cache's ----

    def begin(self, slot: int, start: int) -> None:
        self.inner.begin(slot, start)

    def prefilled(self, slot: int, start: int, stop: int) -> None:
        self.inner.prefilled(slot, start, stop)

    def commit(self, slot: int, path: Sequence[int], ws: Workspace) -> None:
        self.inner.commit(slot, path, ws)

    def room(self, slot: int) -> int:
        return self.inner.room(slot)

    def reusable(self, slot: int, common: int) -> int:
        return self.inner.reusable(slot, common)

    def largest_entry(self, chunk: int) -> int:
        return self.inner.largest_entry(chunk)

    def entry_nbytes(self, slot: int, start: int, stop: int) -> int:
        return self.inner.entry_nbytes(slot, start, stop)

    def save(self, slot: int, start: int, stop: int, put: Move) -> None:
        self.inner.save(slot, start, stop, put)

    def restore(self, slot: int, start: int, stop: int, get: Move) -> None:
        self.inner.restore(slot, start, stop, get)

    def close(self) -> None:
        self.inner.close()

    def rehearse(self, count: int) -> None:
        self.inner.rehearse(count)

    @contextmanager
    def whole(self, layer: int, segment: Any, ws: Workspace) -> Iterator[None]:
        with self.inner.whole(layer, segment, ws):
            yield


def _place(maps: Maps, layout: LayerLayout, arena: Arena) -> _Placed:
    """Copies the maps of a layer that has ``layout`` into ``arena``."""
    keys = _matrices(maps.keys, arena)
    queries = keys if maps.queries is maps.keys else _matrices(maps.queries, arena)
    values, outputs = _matrices(maps.values, arena), _matrices(maps.outputs, arena)
    shift = place(arena, (layout.heads * layout.value_dim,), torch.float32)
    shift.view(layout.kv_heads, -1, layout.value_dim).copy_(maps.shift[:, None])
    return _Placed(keys, queries, values, outputs, shift, maps.merged)


def _matrices(stack: torch.Tensor, arena: Arena) -> list[Weight]:
    """Each matrix of ``stack`` (n, rows, cols) in ``arena``."""
    copy = place(arena, tuple(stack.shape), torch.float32)
    copy.copy_(stack)
    return [Weight(each.view(-1).view(torch.uint8), "f32", 0, *each.shape) for each in copy]
