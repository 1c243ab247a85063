"""A lower store of what linear maps do not say of keys and values: those of a layer by those of the layer before.

What one layer has of a sequence's older tokens is made of what the layer before has of them, and that of the layer
before it; so there is room for one layer's keys and values, and a step that goes through the layers in turn takes it
from one to the next. Attention reads it there as it reads any pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.errors import UsageError
from tightfit.kernels import attention, cpu, ops, pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.codec import Codec
from tightfit.kernels.matmul import gemm, vector_matmul
from tightfit.kernels.pages import PAGE, Pages, Rows, Run
from tightfit.kernels.weight import Weight
from tightfit.kv.base import LayerLayout, Rotation
from tightfit.kv.cache import numbers, place
from tightfit.kv.lower import LowerStore
from tightfit.kv.merge.tokens import READ_AT_ONCE, TokensAt
from tightfit.kv.method import Lowering


class Numbers(NamedTuple):
    """Keys (n, kv_heads, key_dim), not turned, and values (n, kv_heads, value_dim) of tokens in float32."""

    keys: torch.Tensor
    values: torch.Tensor


class Linear:
    """What a linear map in bfloat16 says of ``width`` features by those of its inputs; a token's bits are its own.
    It is all zeros until :meth:`load`."""

    def __init__(self, width: int, inputs: Sequence[int], arena: Arena) -> None:
        self.parts = [Weight(place(arena, (2 * width * each,), torch.uint8), "bf16", 0, width, each) for each in inputs]
        self.offset = place(arena, (width,), torch.float32)

    def load(self, matrix: torch.Tensor, offset: torch.Tensor) -> None:
        """Copies a matrix (width, all inputs) and an offset (width,) into the arena."""
        for part, columns in zip(self.parts, matrix.split([part.cols for part in self.parts], 1), strict=True):
            part.data.view(torch.bfloat16).view(part.rows, part.cols).copy_(columns)
        self.offset.copy_(offset)

    def add(self, out_: torch.Tensor, *inputs: torch.Tensor, dtype: torch.dtype, ws: Workspace) -> None:
        """Adds to ``out`` (n, heads, dim) what ``inputs`` (n, heads, dim) say. Where the cache's ``dtype`` is bfloat16,
        they are rounded to it if that makes products faster: those of the layer before were."""
        sums = out_.flatten(1)
        for part, x in zip(self.parts, inputs, strict=True):
            if dtype == torch.bfloat16 and cpu.has_gemm():
                gemm(x.flatten(1), part, sums, [(0, len(sums))], dtype, ws, accumulate=1.0)
            else:
                vector_matmul(x.flatten(1), part, sums, ws, accumulate=1.0)
        ops.add_(sums, self.offset)


class Chain:
    """What the stores of all layers have in common: dense pages for what the layer ``at`` (-1: none) has of a
    sequence's tokens, turned as attention wants it. Page j of a head h is ``j * kv_heads + h``."""

    def __init__(self, layout: LayerLayout, table_pages: int, sequences: int, dtype: torch.dtype, arena: Arena) -> None:
        self.layout = layout
        heads = layout.kv_heads
        room = sequences, heads * table_pages, PAGE
        self.keys = place(arena, (*room, layout.key_dim), dtype)
        self.values = place(arena, (*room, layout.value_dim), dtype)
        self.table = numbers(arena, sequences, heads, table_pages)
        self.nothing = numbers(arena, sequences, heads)
        self.free = numbers(arena, sequences, 1)
        self.at = [-1] * sequences
        self.stores: list[PredictedStore] = []

    def clear(self, slot: int) -> None:
        heads, table_pages = self.table.shape[1:]
        self.table[slot] = torch.arange(heads * table_pages, dtype=torch.int32).view(table_pages, heads).T
        self.nothing[slot] = 0
        self.free[slot] = 0
        self.at[slot] = -1

    def pages(self, of: Pages) -> Pages:
        """These pages, with as many tokens as ``of`` has."""
        bits = 8 * self.keys.dtype.itemsize
        return Pages(
            self.keys,
            self.values,
            self.table,
            of.lengths,
            *(self.nothing, self.nothing, self.nothing),
            *(self.free, self.free),
            of.tokens,
            Codec(bits, self.layout.key_dim, per_channel=True),
            Codec(bits, self.layout.value_dim, per_channel=False),
        )

    def tokens(self, slot: int, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (pages, PAGE, kv_heads, dim) of the keys and values of tokens in whole pages."""
        heads = self.layout.kv_heads
        keys, values = (x[slot, first // PAGE * heads : stop // PAGE * heads] for x in (self.keys, self.values))
        return keys.unflatten(0, (-1, heads)).transpose(1, 2), values.unflatten(0, (-1, heads)).transpose(1, 2)


class PredictedStore(LowerStore):
    """The lower store of one layer, of which ``before`` is that of the layer before; its i-th token stands at position
    ``sinks`` + i. All heads have the same tokens, in whole pages. The arguments are those of :class:`LowerStore`."""

    repeats = False  # how much is computed in a step grows

    def __init__(
        self,
        before: PredictedStore | None,
        sinks: int,
        demoter: Lowering,
        layout: LayerLayout,
        most: int,
        longest: int,
        sequences: int,
        dtype: torch.dtype,
        arena: Arena,
        *others: Any,
    ) -> None:
        super().__init__(demoter, layout, most, longest, sequences, dtype, arena, *others)
        assert layout.rotation is not None
        self.sinks, self.before, self.layout = sinks, before, layout
        self._rotation, self._frequencies = layout.rotation, torch.tensor(layout.rotation.frequencies)
        self.chain: Chain = (
            Chain(layout, self.pages.table.shape[2], sequences, dtype, arena) if before is None else before.chain
        )
        if _shape(layout) != _shape(self.chain.layout):
            raise UsageError(
                f"{demoter.name} predicts layers by the one before, and this model's have different shapes",
                "Use another method.",
            )
        self.index = len(self.chain.stores)
        self.chain.stores.append(self)
        self.looked_at = self.chain.pages(self.pages)
        if before is not None:
            keys, values = layout.kv_heads * layout.key_dim, layout.kv_heads * layout.value_dim
            self.key_map, self.value_map = Linear(keys, [keys], arena), Linear(values, [keys, values], arena)

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self.chain.clear(slot)

    # ---- attention ----

    def join_rows(
        self, rows: Rows, q: torch.Tensor, out_: torch.Tensor, lse_: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        for slot in [0] if ops.is_dry() else sorted(set(rows.places[: len(q), 0].tolist())):
            self.reach(slot, ws)
        super().join_rows(rows, q, out_, lse_, ws, scoring)

    def join(
        self,
        slot: int,
        q: torch.Tensor,
        out_: torch.Tensor,
        lse_: torch.Tensor,
        ws: Workspace,
        scoring: Scoring,
        bf16: bool,
    ) -> None:
        self.reach(slot, ws)
        super().join(slot, q, out_, lse_, ws, scoring, bf16)

    def reach(self, slot: int, ws: Workspace) -> None:
        """Sees to it that the chain is at this layer, from where it is or from the first layer on."""
        chain, stop = self.chain, self.index + 1
        start = chain.at[slot] + 1 if chain.at[slot] < stop else 0
        if ops.is_dry():
            self._advance(slot, 0, READ_AT_ONCE, ws)
            return
        for store in chain.stores[start:stop]:
            length = int(store.pages.lengths[slot, 0])
            for first in range(0, length, READ_AT_ONCE):
                store._advance(slot, first, min(first + READ_AT_ONCE, length), ws)
        chain.at[slot] = self.index

    def _advance(self, slot: int, first: int, stop: int, ws: Workspace) -> None:
        """Makes of what the chain has of tokens in the layer before what it has in this one."""
        with ws.frame():
            before, found = self._of_before(slot, first, stop, ws), self._missed(slot, first, stop, ws)
            self._add_keys(before, found.keys, ws)
            self._add_values(found.keys, before, found.values, ws)
            self._turn(found.keys, first, 1.0, ws)
            for of_chain, x in zip(self.chain.tokens(slot, first, stop), found, strict=True):
                ops.copy_(of_chain, x.unflatten(0, (-1, PAGE)))

    # ---- tokens that come ----

    def _take(self, slot: int, upper: Pages, run: Run, places: list[torch.Tensor], ws: Workspace) -> None:
        """Codes what is missed when keys, and with the keys that are then read, values are predicted."""
        count = len(places[0])
        if count == 0:
            return
        first = 0 if ops.is_dry() else int(self.pages.lengths[slot, 0])
        stop = first + count
        with ws.frame():
            before, found = self._of_before(slot, first, stop, ws), self._room(count, ws)
            for head, part in enumerate(places):
                at = 0
                for block in TokensAt(upper, slot, head, run, part, ws).blocks():
                    assert block.values is not None
                    rows = slice(at, at + len(block.keys))
                    ops.copy_(found.keys[rows, head], block.keys)
                    ops.copy_(found.values[rows, head], block.values)
                    at = rows.stop
            self._turn(found.keys, first, -1.0, ws)
            said = self._room(count, ws)
            for x in said:
                ops.zero_(x)
            self._add_keys(before, said.keys, ws)
            ops.add_(found.keys.flatten(1), said.keys.flatten(1), -1.0)
            self._code(slot, first, Numbers(found.keys, said.values), ws)
            keys = self._missed(slot, first, stop, ws).keys
            self._add_keys(before, keys, ws)
            self._add_values(keys, before, said.values, ws)
            ops.add_(found.values.flatten(1), said.values.flatten(1), -1.0)
            self._code(slot, first, found, ws)
        self._advance(slot, first, stop, ws)

    def _code(self, slot: int, first: int, missed: Numbers, ws: Workspace) -> None:
        """Codes what is missed of tokens from ``first`` on, in place of what was coded there."""
        kept, heads, count = self.pages, self.layout.kv_heads, len(missed.keys)
        with ws.frame():
            keys = ws.empty(heads, count, self.layout.key_dim, dtype=self.dtype)
            values = ws.empty(heads, count, self.layout.value_dim, dtype=self.dtype)
            ops.copy_(keys, missed.keys.transpose(0, 1))
            ops.copy_(values, missed.values.transpose(0, 1))
            indices = ws.empty(heads, kept.table.shape[2] * PAGE, dtype=torch.int32)
            listed = torch.full((heads,), first + count, dtype=torch.int32)
            if not ops.is_dry():
                there = int(kept.lengths[slot, 0])
                indices[:, :first] = torch.arange(first)
                indices[:, first : first + count] = torch.arange(there, there + count)
            pages.keep(kept, slot, Run(keys, values, count), ws, indices, listed, resident=self.resident, tail=0)

    # ---- what is known of tokens ----

    def _room(self, count: int, ws: Workspace) -> Numbers:
        layout = self.layout
        return Numbers(*(ws.empty(count, layout.kv_heads, dim) for dim in (layout.key_dim, layout.value_dim)))

    def _of_before(self, slot: int, first: int, stop: int, ws: Workspace) -> Numbers | None:
        """What the chain has of tokens, which is that of the layer before."""
        if self.before is None:
            return None
        found = self._room(stop - first, ws)
        for x, of_chain in zip(found, self.chain.tokens(slot, first, stop), strict=True):
            ops.copy_(x.unflatten(0, (-1, PAGE)), of_chain)
        self.before._turn(found.keys, first, -1.0, ws)
        return found

    def _add_keys(self, before: Numbers | None, keys_: torch.Tensor, ws: Workspace) -> None:
        """Adds what the layer before says of keys."""
        if before is not None:
            self.key_map.add(keys_, before.keys, dtype=self.dtype, ws=ws)

    def _add_values(self, keys: torch.Tensor, before: Numbers | None, values_: torch.Tensor, ws: Workspace) -> None:
        """Adds what ``keys`` of this layer and the layer before say of values."""
        if before is not None:
            self.value_map.add(values_, keys, before.values, dtype=self.dtype, ws=ws)

    def _missed(self, slot: int, first: int, stop: int, ws: Workspace) -> Numbers:
        """What the codes of tokens say."""
        found, nothing = self._room(stop - first, ws), Run(self.pages.keys[slot], self.pages.values[slot], 0)
        for head in range(self.layout.kv_heads):
            with ws.frame():
                for x, of_head in zip(found, pages.read(self.pages, slot, head, nothing, first, stop, ws), strict=True):
                    ops.copy_(x[:, head], of_head)
        return found

    def _turn(self, keys_: torch.Tensor, first: int, sign: float, ws: Workspace) -> None:
        """Turns keys (n, kv_heads, key_dim) of tokens from ``first`` on to where they stand, or back."""
        turn_(keys_, self.sinks + first, sign, self._rotation, self._frequencies, ws)


def turn_(
    keys_: torch.Tensor, first: int, sign: float, rotation: Rotation, frequencies: torch.Tensor, ws: Workspace
) -> None:
    """Turns keys (n, heads, dim) of positions from ``first`` on, or with ``sign`` -1 back; ``frequencies`` are those of
    ``rotation``."""
    count, half = len(keys_), len(frequencies)
    if half:
        with ws.frame():
            cos, sin = ws.empty(2, count, half)
            ops.rotation(torch.arange(first, first + count, dtype=torch.float32), frequencies, 1.0, cos, sin)
            ops.scale_(sin, sign)
            attention.rotate_(keys_, cos, sin, rotation.interleaved, ws)


def _shape(layout: LayerLayout) -> tuple[int, int, int]:
    return layout.kv_heads, layout.key_dim, layout.value_dim
