"""The lower store: a second store of pages in which tokens lie that left the first.

An evictor that is a :class:`~tightfit.kv.method.Demoter` judges tokens as others do, but what it lets go of goes on
here, page by page in codes of its own, and where that is fewer features, projected. Queries look at both, and what they
find is joined by the logarithms of what each softmax divides by, so that nothing is hidden from them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import ops, pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import PAGE, Looking, Pages, Rows, Run
from tightfit.kv.base import LayerLayout
from tightfit.kv.beside import Beside, Going
from tightfit.kv.cache import as_bytes, numbers, place, table
from tightfit.kv.entries import InFile, parts
from tightfit.kv.merge.tokens import READ_AT_ONCE, TokensAt
from tightfit.kv.method import Lowering


class LowerStore(Beside):
    """Of one layer: room for ``most`` tokens of each sequence and head on average, and for ``longest`` of one head.

    With a ``file``, whole pages lie in it, from byte ``at`` on; ``end`` is where they end. ``tokens`` (sequences,)
    int32 says how many tokens came of each sequence.
    """

    def __init__(
        self,
        demoter: Lowering,
        layout: LayerLayout,
        most: int,
        longest: int,
        sequences: int,
        dtype: torch.dtype,
        arena: Arena,
        tokens: torch.Tensor,
        file: int = -1,
        at: int = 0,
    ) -> None:
        self.merged = demoter.merges(layout)
        heads, as_they_are = layout.kv_heads // self.merged, 8 * dtype.itemsize
        key_codec, value_codec = demoter.lower(layout, as_they_are)
        key_dim, value_dim = key_codec.dim, value_codec.dim
        table_pages = -(-longest // PAGE)
        coded_pages = heads if file >= 0 else heads * most // PAGE  # whole ones; of each head one more is being filled
        keys = place(arena, (sequences, heads, PAGE, key_dim), dtype)
        values = keys[..., :value_dim] if layout.shared else place(arena, (sequences, heads, PAGE, value_dim), dtype)
        coded = sequences, coded_pages

        values_at = at + sequences * heads * table_pages * key_codec.page_bytes
        self.end = values_at + sequences * heads * table_pages * value_codec.page_bytes if file >= 0 else at
        self.resident = 0 if file >= 0 else pages.EVERYTHING
        self.demoter, self.dtype = demoter, dtype
        self.pages = Pages(
            keys,
            values,
            numbers(arena, sequences, heads, table_pages),
            lengths=numbers(arena, sequences, heads),
            coded=numbers(arena, sequences, heads),
            cold=numbers(arena, sequences, heads),
            bounded=numbers(arena, sequences, heads),
            dense_free=numbers(arena, sequences, 1 + heads),
            coded_free=numbers(arena, sequences, 1 + coded_pages),
            tokens=tokens,
            key_codec=key_codec,
            value_codec=value_codec,
            coded_keys=place(arena, (*coded, key_codec.page_bytes), torch.uint8),
            coded_values=None if layout.shared else place(arena, (*coded, value_codec.page_bytes), torch.uint8),
            file=file,
            keys_at=at,
            values_at=values_at,
            key_side=table(arena, key_codec, sequences, heads),
            value_side=None if layout.shared else table(arena, value_codec, sequences, heads),
        )
        self.looked_at = self.pages  # by queries
        self.projected = self.merged > 1 or (key_dim, value_dim) != (layout.key_dim, layout.value_dim)
        if self.projected:

            def matrices(rows: int, columns: int) -> torch.Tensor:
                return place(arena, (layout.kv_heads, rows, columns), torch.float32)

            # To what is kept of keys and of values, of queries to what keys are multiplied with, and back to values.
            self.to_keys, self.to_queries = matrices(layout.key_dim, key_dim), matrices(layout.key_dim, key_dim)
            self.to_values = matrices(layout.value_dim, value_dim)
            self.from_values = matrices(value_dim, layout.value_dim)

    @property
    def stores(self) -> list[Pages]:
        return [self.pages]

    # ---- tokens that come ----

    def take(self, going: Going, ws: Workspace) -> None:
        slot, upper, run = going.slot, going.upper, going.run
        with ws.frame():
            leaving = self._room_for_leaving(upper, run, ws)
            below = self.pages.lengths[slot].tolist()
            came = max(below[head // self.merged] + total for head, total in enumerate(going.totals))
            left = []
            for head, row in enumerate(leaving):
                found = going.places(head)
                row[: len(found)] = found
                left.append(len(found))
            for at in range(0, max(left), READ_AT_ONCE):
                stops = [min(count, at + READ_AT_ONCE) for count in left]
                places = [leaving[head, at:stop].long() for head, stop in enumerate(stops)]
                self.judge(slot, going.given, places, came)
                self._take(slot, upper, run, places, ws)

    def judge(self, slot: int, given: torch.Tensor, places: list[torch.Tensor], tokens: int) -> None:
        """Sees what tokens at ``places`` (n,) int64 of each head received of ``given`` (kv_heads, m), before they are
        taken over; ``tokens`` came so far."""

    def copy(self, slot: int, upper: Pages, ws: Workspace) -> None:
        """Takes those whole pages of a sequence that came since the last time, which stay in ``upper`` too. All heads
        must have the same tokens."""
        nothing, heads = Run(upper.keys[slot], upper.values[slot], 0), upper.table.shape[1]
        have, whole = int(self.pages.lengths[slot, 0]), int(upper.lengths[slot, 0]) // PAGE * PAGE
        if ops.is_dry():
            have, whole = 0, READ_AT_ONCE
        for at in range(have, whole, READ_AT_ONCE):
            places = torch.arange(at, min(at + READ_AT_ONCE, whole))
            self._take(slot, upper, nothing, [places] * heads, ws)

    def take_most(self, slot: int, upper: Pages, run: Run, ws: Workspace) -> None:
        with ws.frame():
            self._room_for_leaving(upper, run, ws)
            self._take(slot, upper, run, [torch.arange(READ_AT_ONCE)] * len(run.keys), ws)

    def _room_for_leaving(self, upper: Pages, run: Run, ws: Workspace) -> torch.Tensor:
        return ws.empty(len(run.keys), upper.table.shape[2] * PAGE + run.count, dtype=torch.int32)

    def _take(self, slot: int, upper: Pages, run: Run, places: list[torch.Tensor], ws: Workspace) -> None:
        """Takes over the tokens at ``places`` (n,) int64 of each head, ascending, at most READ_AT_ONCE."""
        kept, places = self.pages, places[:: self.merged]
        with ws.frame():
            shape = len(places), READ_AT_ONCE
            keys = ws.empty(*shape, kept.key_shape[1], dtype=self.dtype)
            values = keys if kept.shared else ws.empty(*shape, kept.value_shape[1], dtype=self.dtype)
            before, capacity = kept.lengths[slot].tolist(), kept.table.shape[2] * PAGE
            indices = ws.empty(len(places), capacity, dtype=torch.int32)
            counts = [length + len(part) for length, part in zip(before, places, strict=True)]
            for head, part in enumerate(places):
                with ws.frame():
                    k, v = ws.empty(len(part), kept.key_shape[1]), ws.empty(len(part), kept.value_shape[1])
                    for index in range(self.merged):
                        self._read(TokensAt(upper, slot, head * self.merged + index, run, part, ws), k, v, index > 0)
                    ops.copy_(keys[head, : len(part)], k)
                    if not kept.shared:
                        ops.copy_(values[head, : len(part)], v)
                if not ops.is_dry():
                    indices[head, : counts[head]] = torch.arange(counts[head])
            taken = Run(keys, values, READ_AT_ONCE)
            listed = torch.tensor(counts, dtype=torch.int32)
            pages.keep(kept, slot, taken, ws, indices, listed, resident=self.resident, tail=0)

    def _read(self, tokens: TokensAt, keys_: torch.Tensor, values_: torch.Tensor, add: bool) -> None:
        """Writes what is kept of tokens into ``keys`` and ``values`` (n, dim) in float32, or adds it."""
        write, at, ws = ops.add_ if add else ops.copy_, 0, tokens.ws
        for block in tokens.blocks():
            rows = slice(at, at + len(block.keys))
            with ws.frame():
                write(keys_[rows], self._features(block.keys, tokens.head, "to_keys", ws))
                if block.values is not None:
                    write(values_[rows], self._features(block.values, tokens.head, "to_values", ws))
            at = rows.stop

    def _features(self, x: torch.Tensor, head: int, matrix: str, ws: Workspace) -> torch.Tensor:
        """What is kept of keys or values ``x`` (n, dim) of a head."""
        if not self.projected:
            return x
        to = getattr(self, matrix)[head : head + 1]
        out = ws.empty(len(x), 1, to.shape[2])
        pages.project(x[:, None], to, out)
        return out[:, 0]

    # ---- attention ----

    def join_rows(
        self, rows: Rows, q: torch.Tensor, out_: torch.Tensor, lse_: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        with ws.frame():
            looking, part, sums = self._look(q, ws)
            pages.attend_rows(self.looked_at, Rows(rows.places), looking, part, sums, ws, alone(scoring))
            self._join(out_, lse_, part, sums, ws)

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
        kept = self.looked_at
        with ws.frame():
            looking, part, sums = self._look(q, ws)
            nothing = Run(kept.keys[slot], kept.values[slot], 0)
            pages.attend(kept, slot, nothing, 0, looking, part, sums, ws, alone(scoring), bf16)
            self._join(out_, lse_, part, sums, ws)

    def clear(self, slot: int) -> None:
        self.pages.reset(slot)

    def parts(self, slot: int) -> Iterator[torch.Tensor | InFile]:
        yield as_bytes(self.pages.dense_free[slot])
        yield as_bytes(self.pages.coded_free[slot])
        yield from parts(self.pages, slot, 0, None, ())

    def _look(self, q: torch.Tensor, ws: Workspace) -> tuple[Looking, torch.Tensor, torch.Tensor]:
        """Queries as keys here are multiplied, and room for what they find."""
        n, heads, _ = q.shape
        if self.projected:
            turned = ws.empty(n, heads, self.pages.key_shape[1])
            pages.project(q, self.to_queries, turned)
            q = turned
        return Looking(q, certain=True), ws.empty(n, heads, self.pages.value_shape[1]), ws.empty(n, heads)

    def _join(
        self, out_: torch.Tensor, lse_: torch.Tensor, part: torch.Tensor, sums: torch.Tensor, ws: Workspace
    ) -> None:
        if self.projected:
            whole = ws.empty(*out_.shape)
            pages.project(part, self.from_values, whole)
            part = whole
        pages.join(out_, lse_, part, sums)


def alone(scoring: Scoring) -> Scoring:
    """No layer with a window has a lower store, and sinks were summed up already."""
    return scoring._replace(window=None, sinks=None)
