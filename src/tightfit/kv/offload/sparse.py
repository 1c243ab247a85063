"""A lower store of which rows that decode see only the tokens that mattered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import ops, pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import PAGE, Looking, Rows, Run
from tightfit.kv.base import LayerLayout
from tightfit.kv.cache import as_bytes, place
from tightfit.kv.entries import InFile
from tightfit.kv.lower import LowerStore, alone

if TYPE_CHECKING:
    from tightfit.kv.offload.hgca import HGCA


class SparseStore(LowerStore):
    """The ``listed`` tokens (sequences, kv_heads, n) int32 of it, ascending and then -1, mattered: when they came, or
    to the last queries of the last chunk of a prompt."""

    def __init__(
        self,
        method: HGCA,
        layout: LayerLayout,
        most: int,
        longest: int,
        sequences: int,
        dtype: torch.dtype,
        arena: Arena,
        *others: Any,
    ) -> None:
        super().__init__(method, layout, most, longest, sequences, dtype, arena, *others)
        self.method = method
        self.listed = place(arena, (sequences, layout.kv_heads, self.pages.table.shape[2] * PAGE), torch.int32)

    def parts(self, slot: int) -> Iterator[torch.Tensor | InFile]:
        yield from super().parts(slot)
        yield as_bytes(self.listed[slot])

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self.listed[slot] = -1

    def judge(self, slot: int, given: torch.Tensor, places: list[torch.Tensor], tokens: int) -> None:
        for head, part in enumerate(places):
            matter = self.method.matter(given[head, part], given[head].sum(), tokens)
            first, length = int(self.pages.lengths[slot, head]), self.count(slot, head)
            found = first + matter.nonzero()[:, 0]
            self.listed[slot, head, length : length + len(found)] = found

    def count(self, slot: int, head: int) -> int:
        """How many tokens of a head mattered."""
        return int((self.listed[slot, head] >= 0).sum())

    def join_rows(
        self, rows: Rows, q: torch.Tensor, out_: torch.Tensor, lse_: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        with ws.frame():
            part, sums = ws.empty(*out_.shape), ws.empty(*lse_.shape)
            listed = ws.empty(len(q), *self.listed.shape[1:], dtype=torch.int32)
            since = ws.empty(len(q), self.listed.shape[1], dtype=torch.int32)
            _of_rows(rows.places, self.listed, listed)
            _of_rows(rows.places, self.pages.lengths, since)
            looking = Looking(q, listed=listed, since=since, certain=True)
            pages.attend_rows(self.pages, Rows(rows.places), looking, part, sums, ws, alone(scoring))
            pages.join(out_, lse_, part, sums)

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
        super().join(slot, q, out_, lse_, ws, scoring, bf16)
        kept, first = self.pages, max(len(q) - self.method.window, 0)
        with ws.frame():
            mass = ws.empty(*self.listed.shape[1:])
            ops.zero_(mass)
            last, nothing = Looking(q[first:], certain=True), Run(kept.keys[slot], kept.values[slot], 0)
            pages.weigh(kept, slot, nothing, 0, last, lse_[first:], mass, ws, alone(scoring))
            queries = (len(q) - first) * (q.shape[1] // len(mass))
            came = kept.tokens[slot], len(q)
            _list(mass, kept.lengths[slot], came, queries, self.method, self.listed[slot])


@ops.op
def _of_rows(places: torch.Tensor, of_sequences: torch.Tensor, out: torch.Tensor) -> None:
    """``out`` (n, ...): of each row what its sequence has."""
    torch.index_select(of_sequences, 0, places[: len(out), 0], out=out)


@ops.op
def _list(
    mass: torch.Tensor,
    lengths: torch.Tensor,
    came: tuple[torch.Tensor, int],
    queries: int,
    method: HGCA,
    listed_: torch.Tensor,
) -> None:
    """Lists of each head's tokens those that matter by their ``mass`` (kv_heads, n) from so many queries; ``came`` are
    the tokens that are certain, and those of the queries' chunk."""
    tokens = int(came[0]) + came[1]
    for head, length in enumerate(lengths.tolist()):
        matter = method.matter(mass[head, :length], torch.tensor(float(queries)), tokens).nonzero()[:, 0]
        listed_[head] = -1
        listed_[head, : len(matter)] = matter
