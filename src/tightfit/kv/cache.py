"""Keys and values of a fixed number of sequences, kept as they are.

Storage is one run of slots for each sequence and layer, mapped once. A layer with a sliding window keeps only as many
tokens as its window and one chunk need, as a ring. Latent attention keeps one latent for each token, and its values
are a view of its keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tightfit.budget.ledger import ALIGNMENT, Arena, Workspace
from tightfit.kernels import ops
from tightfit.kernels.attention import Slots, attend


@dataclass(frozen=True)
class LayerLayout:
    """What one layer keeps of one sequence: ``slots`` tokens.

    ``shared`` values are the first ``value_dim`` features of the keys and take no bytes.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    slots: int
    shared: bool = False

    def nbytes(self, itemsize: int) -> int:
        return self.kv_heads * self.slots * itemsize * (self.key_dim + (0 if self.shared else self.value_dim))


class Cache:
    """The ``kv`` account: keys and values of ``sequences`` sequences in every layer, in ``dtype``.

    ``gemm_dtype`` is what prefill multiplies in: torch.bfloat16 or torch.float32.
    """

    def __init__(
        self,
        layouts: list[LayerLayout],
        sequences: int,
        dtype: torch.dtype,
        arena: Arena,
        gemm_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layouts = layouts
        self.sequences = sequences
        self.gemm_dtype = gemm_dtype
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        for layout in layouts:
            shape = (sequences, layout.kv_heads, layout.slots)
            keys = _place(arena, (*shape, layout.key_dim), dtype)
            shared = keys[..., : layout.value_dim]
            self._keys.append(keys)
            self._values.append(shared if layout.shared else _place(arena, (*shape, layout.value_dim), dtype))

    @staticmethod
    def nbytes(layouts: list[LayerLayout], sequences: int, itemsize: int) -> int:
        """Bytes that a cache of these layouts takes."""
        return sum(sequences * layout.nbytes(itemsize) + 2 * ALIGNMENT for layout in layouts)

    def append(self, layer: int, sequence: int, start: int, k: torch.Tensor, v: torch.Tensor | None) -> None:
        """Keeps ``k`` (n, kv_heads, key_dim) and ``v`` (n, kv_heads, value_dim) of the tokens at ``start`` onwards;
        no ``v`` where values are a view of keys."""
        size, done = self.layouts[layer].slots, 0
        while done < k.shape[0]:  # a ring may wrap
            slot = (start + done) % size
            count = min(k.shape[0] - done, size - slot)
            ops.copy_(self._keys[layer][sequence, :, slot : slot + count], k[done : done + count].transpose(0, 1))
            if v is not None:
                ops.copy_(self._values[layer][sequence, :, slot : slot + count], v[done : done + count].transpose(0, 1))
            done += count

    def attend(
        self,
        layer: int,
        sequence: int,
        start: int,
        q: torch.Tensor,
        out: torch.Tensor,
        ws: Workspace,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        gemm: bool = False,
    ) -> None:
        """Attention of the newest tokens, ``q`` (n, heads, key_dim), whose keys were appended at ``start`` onwards,
        into ``out`` (n, heads, value_dim); see :func:`tightfit.kernels.attention.attend`. ``gemm`` is for prefill:
        products are then made in ``gemm_dtype`` where that is faster.

        Raises ValueError where the cache no longer holds all that they see: the context is full, or a layer with a
        window was given more tokens at once than its ring was made for.
        """
        slots = Slots(start + q.shape[0], self.layouts[layer].slots)
        seen = slots.length if window is None else min(slots.length, window - 1 + q.shape[0])
        if seen > slots.size:
            raise ValueError(f"attention over {seen} tokens in layer {layer}, which keeps {slots.size}")
        keys, values = self._keys[layer][sequence], self._values[layer][sequence]
        attend(
            q,
            keys,
            values,
            slots,
            start,
            out,
            ws,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            gemm_dtype=self.gemm_dtype if gemm else torch.float32,
        )


def _place(arena: Arena, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    return arena.take(nbytes).view(dtype).view(shape)


def window_slots(context: int, window: int | None, chunk: int) -> int:
    """Tokens that a layer must keep: all, or its window and the chunk that is being added."""
    return context if window is None else min(context, window - 1 + chunk)
