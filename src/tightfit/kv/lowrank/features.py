"""Keys and values with fewer features or heads than the model's, in whatever cache the rest of a composition makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import ops, pages
from tightfit.kernels.attention import Scoring
from tightfit.kv.base import BaseCache, LayerLayout, Move, Step, Turn, Turned
from tightfit.kv.cache import placed


@dataclass(frozen=True)
class Maps:
    """How one layer's keys and values are stored: float32 matrices by which those of a token are multiplied.

    Of each stored head there is one of ``keys`` (stored_heads, merged * key_dim, key_rank): keys of ``merged``
    neighbouring heads, one behind the other, become one. They are looked at by queries times ``queries`` (kv_heads,
    key_dim, key_rank), where None stands for the rows of ``keys``: then scores are those of keys that were projected.
    In the same way ``values`` (stored_heads, merged * value_dim, value_rank), and what attention makes of them becomes
    outputs again times ``outputs`` (kv_heads, value_rank, value_dim), plus ``shift`` (kv_heads, value_dim).
    """

    keys: torch.Tensor
    values: torch.Tensor
    outputs: torch.Tensor
    shift: torch.Tensor
    queries: torch.Tensor | None = None

    def stored(self, layout: LayerLayout) -> LayerLayout:
        """What is kept of a layer that has ``layout``."""
        heads, _, key_rank = self.keys.shape
        return replace(layout, kv_heads=heads, key_dim=key_rank, value_dim=self.values.shape[2], rotation=None)

    def placed(self, layout: LayerLayout, arena: Arena) -> Maps:
        """Those of a layer that has ``layout``, in ``arena``: with a ``shift`` (heads, value_dim) of each query head,
        and with ``queries``."""
        shift = self.shift.repeat_interleave(layout.heads // len(self.shift), 0)
        keys, values, outputs, shift = (placed(x.float(), arena) for x in (self.keys, self.values, self.outputs, shift))
        if self.queries is None:
            queries = keys.view(layout.kv_heads, layout.key_dim, keys.shape[2])
        else:
            queries = placed(self.queries.float(), arena)
        return Maps(keys, values, outputs, shift, queries)


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
        self.repeatable = inner.repeatable
        own = {layer: maps[layer].placed(layouts[layer], arena) for layer in inner.own}
        self._maps = [own[owner] for owner in inner.owners]

    @property
    def owners(self) -> list[int]:  # type: ignore[override]
        return self.inner.owners

    @property
    def stored(self) -> BaseCache:
        return self.inner.stored

    # ---- a step ----

    def anchor_positions(self, positions: torch.Tensor) -> torch.Tensor:
        return self.inner.anchor_positions(positions)

    @property
    def reads(self) -> bool:
        return self.inner.reads

    def resolve(self, encode: Callable[[str], list[int]]) -> None:
        self.inner.resolve(encode)

    def told(self, slot: int, start: int, tokens: Sequence[int]) -> None:
        self.inner.told(slot, start, tokens)

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
        assert maps.queries is not None
        anchor_q = None if turn is None else turn.apply(q_, k_, True, ws)
        if anchor_q is not None:
            turned = Turned(self._times(anchor_q, maps.queries, step, ws))
        q = self._times(q_, maps.queries, step, ws)
        if k_ is None or v is None:
            return _Held(self.inner.update(layer, step, q, None, None, turned, ws), q)
        k, values = (
            self._times(x.view(count, len(m), -1), m, step, ws) for x, m in ((k_, maps.keys), (v, maps.values))
        )
        return _Held(self.inner.update(layer, step, q, k, values, turned, ws), q)

    def attend_step(
        self, layer: int, step: Step, held: _Held, q: torch.Tensor, out: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        maps = self._maps[layer]
        with ws.frame():
            attended = ws.empty(*out.shape[:2], maps.outputs.shape[1])
            self.inner.attend_step(layer, step, held.inner, held.q, attended, ws, scoring)
            multiply(attended, maps.outputs, out, step, ws)
            ops.add_(out.view(out.shape[0], -1), maps.shift.view(-1))

    def _times(self, x: torch.Tensor, matrices: torch.Tensor, step: Step, ws: Workspace) -> torch.Tensor:
        out = ws.empty(*x.shape[:2], matrices.shape[2])
        multiply(x, matrices, out, step, ws)
        return out

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


def multiply(x: torch.Tensor, matrices: torch.Tensor, out: torch.Tensor, step: Step, ws: Workspace) -> None:
    """``out`` (n, heads, m) = ``x`` (n, heads, dim) times that of ``matrices`` (kv_heads, dim, m) of each head's group.
    The bits of rows that decode are their own, those of a prompt's chunk depend on the chunk alone."""
    rows = step.vector
    if rows:
        pages.project(x[:rows], matrices, out[:rows])
    for _, a, b in step.prefills:
        with ws.frame():
            _products(x[a:b], matrices, out[a:b], ws.empty(b - a, matrices.shape[2]))


@ops.op
def _products(x: torch.Tensor, matrices: torch.Tensor, out: torch.Tensor, product: torch.Tensor) -> None:
    heads = x.shape[1]
    for head in range(heads):
        torch.mm(x[:, head], matrices[head // (heads // len(matrices))], out=product)
        out[:, head] = product
