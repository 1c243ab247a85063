"""Keys and values of a fixed number of sequences, kept as they are.

Storage is one run of slots for each sequence and layer, mapped once. A layer with a sliding window keeps only as many
tokens as its window and one chunk need, as a ring. Latent attention keeps one latent for each token, and its values
are a view of its keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tightfit.budget.ledger import ALIGNMENT, Arena, Workspace
from tightfit.kernels import attention
from tightfit.kernels.attention import KeysValues, Scoring


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

    ``gemm_dtype`` is what prefill multiplies in; with torch.bfloat16 attention does too.
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
        self.layers: list[KeysValues] = []
        for layout in layouts:
            shape = (sequences, layout.kv_heads, layout.slots)
            keys = _place(arena, (*shape, layout.key_dim), dtype)
            shared = keys[..., : layout.value_dim]
            values = shared if layout.shared else _place(arena, (*shape, layout.value_dim), dtype)
            self.layers.append(KeysValues(keys, values))

    @staticmethod
    def nbytes(layouts: list[LayerLayout], sequences: int, itemsize: int) -> int:
        """Bytes that a cache of these layouts takes."""
        return sum(sequences * layout.nbytes(itemsize) + 2 * ALIGNMENT for layout in layouts)

    def append(self, layer: int, places: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None) -> None:
        """Keeps ``k`` (n, kv_heads, key_dim) and ``v`` (n, kv_heads, value_dim) of the tokens at ``places`` (n, 2):
        pairs of sequence and position. No ``v`` where values are a view of keys."""
        attention.append(self.layers[layer], places, k, v)

    def rotate_append(
        self,
        layer: int,
        places: torch.Tensor,
        q_: torch.Tensor,
        k_: torch.Tensor,
        v: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        interleaved: bool,
        ws: Workspace,
    ) -> None:
        """:meth:`append` after the first features of ``q`` (n, heads, key_dim) and ``k`` were rotated in place by
        ``tables``, the cosines and sines of :func:`tightfit.model.rope.tables`."""
        attention.rotate_append(self.layers[layer], places, q_, k_, v, *tables, interleaved, ws)

    def attend_rows(
        self, layer: int, places: torch.Tensor, q: torch.Tensor, out: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        """Attention of tokens that decode, ``q`` (n, heads, key_dim), which were appended at ``places``, each alone,
        into ``out`` (n, heads, value_dim); see :func:`tightfit.kernels.attention.attend_rows`."""
        attention.attend_rows(self.layers[layer], places, q, out, ws, scoring)

    def attend(
        self,
        layer: int,
        sequence: int,
        start: int,
        q: torch.Tensor,
        out: torch.Tensor,
        ws: Workspace,
        scoring: Scoring,
    ) -> None:
        """Attention of tokens that are prefilled, ``q`` (n, heads, key_dim), which were appended at ``start`` onwards,
        into ``out`` (n, heads, value_dim). Products are made in ``gemm_dtype`` where that is faster.

        Raises ValueError where the cache no longer holds all that they see: the context is full, or a layer with a
        window was given more tokens at once than its ring was made for.
        """
        bf16 = self.gemm_dtype == torch.bfloat16
        attention.attend(self.layers[layer], sequence, start, q, out, ws, scoring, bf16)


def _place(arena: Arena, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    return arena.take(nbytes).view(dtype).view(shape)


def window_slots(context: int, window: int | None, chunk: int) -> int:
    """Tokens that a layer must keep: all, or its window and the chunk that is being added."""
    return context if window is None else min(context, window - 1 + chunk)
