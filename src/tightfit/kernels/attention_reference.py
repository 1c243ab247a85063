"""Attention over a cache in torch: a fold over blocks of keys, so that scratch does not grow with the context.

After FlashAttention (https://arxiv.org/abs/2205.14135) with the online softmax of https://arxiv.org/abs/1805.02867.
Blocks start at fixed places and are combined in order, so the bits depend only on what a query sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import ops

KEY_BLOCK = 512  # keys folded at once
SCORE_BYTES = 4 << 20  # float32 scores held at once: they should stay in the cache of a core


@dataclass(frozen=True)
class Slots:
    """Which positions the slots of a cache hold: a ring of ``size`` slots into which ``length`` tokens were written."""

    length: int
    size: int

    @property
    def used(self) -> int:
        return min(self.length, self.size)

    def position(self, slot: int) -> int:
        return self.length - 1 - (self.length - 1 - slot) % self.size

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The lowest and the highest position in slots ``start`` to ``stop``."""
        seam = self.length % self.size  # the next slot to be written: positions fall there
        if self.length > self.size and start < seam < stop:
            return self.position(seam), self.position(seam - 1)
        return self.position(start), self.position(stop - 1)

    def positions(self, start: int, stop: int) -> torch.Tensor:
        """(stop - start,) int64"""
        slots = torch.arange(start, stop)
        if self.length <= self.size:
            return slots
        return self.length - 1 - (self.length - 1 - slots) % self.size


def append(
    keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None
) -> None:
    """``keys[sequence, :, position % slots] = k`` for each row of ``places``, and values likewise."""
    sequences, slots = places[:, 0].long(), places[:, 1].long() % keys.shape[2]
    keys[sequences, :, slots] = k.to(keys.dtype)
    if v is not None:
        values[sequences, :, slots] = v.to(values.dtype)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    out: torch.Tensor,
    ws: Workspace,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Causal attention of one sequence's new tokens over its cached keys and values, the new tokens' included.

    ``q`` (n, heads, key_dim) float32, for positions ``start`` onwards; ``keys`` (kv_heads, slots, key_dim) and
    ``values`` (kv_heads, slots, value_dim) of any float type, ``values`` possibly the first features of ``keys``;
    ``out`` (n, heads, value_dim) float32. See :func:`tightfit.kernels.attention.attend_rows`.
    """
    n, heads, key_dim = q.shape
    kv_heads, value_dim = keys.shape[0], values.shape[-1]
    groups = heads // kv_heads
    slots = Slots(start + n, keys.shape[1])
    seen = slots.length if window is None else min(slots.length, window - 1 + n)
    if seen > slots.size:
        raise ValueError(f"attention over {seen} tokens with a cache that keeps {slots.size}")
    rows = max(1, min(n, SCORE_BYTES // (heads * KEY_BLOCK * 4)))  # queries folded at once
    for at in range(0, n, rows):
        count = min(rows, n - at)
        first, last = start + at, start + at + count - 1
        with ws.frame():
            query = ws.empty(kv_heads, groups * count, key_dim)
            acc, part = ws.empty(2, kv_heads, groups * count, value_dim)
            top, total, new_top = ws.empty(3, kv_heads, groups * count, 1)
            ops.load_queries(q[at : at + count], scale, query, top, total, acc)
            stop = slots.used if slots.length > slots.size else last + 1
            for a in range(0, stop, KEY_BLOCK):
                b = min(a + KEY_BLOCK, stop)
                low, high = slots.span(a, b)
                if low > last or (window is not None and high <= first - window):
                    continue
                visible = high <= first and (window is None or low > last - window)
                with ws.frame():
                    k = _float32(keys[:, a:b], ws)
                    shared = values.data_ptr() == keys.data_ptr()
                    v = k[..., :value_dim] if shared else _float32(values[:, a:b], ws)
                    scores, mask = ws.empty(kv_heads, groups * count, b - a), None
                    if not visible or ops.is_dry():  # a dry run takes the scratch of the worst block for each
                        mask = ws.empty(count, b - a, dtype=torch.bool)
                        ops.causal_mask(slots.positions(a, b), first, window, mask)
                    ops.fold_block(query, k, v, mask, softcap, scores, top, total, acc, new_top, part)
            ops.finish_fold(top, total, acc, sinks, out[at : at + count])


def _float32(cached: torch.Tensor, ws: Workspace) -> torch.Tensor:
    """``cached`` as float32, itself if it is already."""
    if cached.dtype == torch.float32:
        return cached
    block = ws.empty(*cached.shape)
    ops.copy_(block, cached)
    return block
