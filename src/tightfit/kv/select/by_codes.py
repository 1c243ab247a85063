"""Tokens by the codes of their keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import ops
from tightfit.kernels.ops import op
from tightfit.kernels.pages import Rows
from tightfit.kernels.reference import rotate_
from tightfit.kv.cache import as_bytes, numbers, place
from tightfit.kv.select.a2ats import A2ATS
from tightfit.kv.select.clusters import READ_AT_ONCE, Keys
from tightfit.kv.select.grouped import Grouped
from tightfit.kv.select.selecting import Settled, Where


class ByCodes(Grouped):
    """Groups are the tokens with the same code, of which ``coded`` of each head have one; ``centroids`` are the keys of
    the codebook, the same for all sequences."""

    def __init__(self, where: Where, method: A2ATS) -> None:
        super().__init__(where, method, method.codes)
        self.method, self.layer, self.known, self._loaded = method, where.layer, where.known, False
        heads, dim, arena = where.layout.kv_heads, where.layout.key_dim, where.arena
        self.coded = numbers(arena, where.sequences, heads)
        self.book = place(arena, (heads, method.codes, dim), torch.float32)
        self.metric = place(arena, (heads, dim, dim), torch.float32)
        self.centroids = self.book.expand(where.sequences, -1, -1, -1)
        self.angles, self.interleaved = place(arena, (dim // 2,), torch.float32), False
        self.half = dim // 2

    def _load(self) -> None:
        """Takes the codebook; not before a sequence begins, as plans make caches in memory that is never written."""
        if self._loaded or self.known is None:
            return
        self.book.copy_(self.known[f"codebook.{self.layer}"])
        self.metric.copy_(self.known[f"metric.{self.layer}"])
        angles = self.known[f"angles.{self.layer}"]
        self.half, self.interleaved, self._loaded = len(angles) - 1, bool(angles[0]), True
        self.angles[: self.half] = angles[1:]

    def asked(self, rows: Rows, q: torch.Tensor, ws: Workspace) -> torch.Tensor:
        turned, scratch = ws.empty(*q.shape), ws.empty(4, *q.shape[1:])
        _turn_to(self, rows, q, turned, scratch)
        return turned

    def index_bytes(self, slot: int) -> int:
        return 4 * (self.book.numel() + int(self.since[slot].sum()))

    def settled(self, slot: int, now: Settled, ws: Workspace) -> None:
        if ops.is_dry():
            self._encode(slot, 0, 0, min(self.most, READ_AT_ONCE), ws)
            return
        for head, tokens in enumerate(self.pages.lengths[slot].tolist()):
            coded = int(self.coded[slot, head])
            if now.indices is not None and now.counts is not None:
                coded = self.move(slot, head, now.indices[head, : now.counts[head]], coded)
            self._encode(slot, head, coded, tokens, ws)
            self.assigned[slot, head, coded : min(self.method.sinks, tokens)] = -1
            self.coded[slot, head], self.groups[slot, head] = tokens, self.method.codes
            self.count(slot, head, max(tokens - self.method.window, 0))

    def _encode(self, slot: int, head: int, start: int, stop: int, ws: Workspace) -> None:
        """Gives a head's tokens [start, stop) their codes."""
        dim, codes = self.metric.shape[2], self.method.codes
        with ws.frame():
            centres, lengths = ws.empty(codes, dim), ws.empty(codes)
            _centres(self.book[head], self.metric[head], centres, lengths)
            for at, k in Keys(self.pages, slot, head, start, stop, ws).blocks():
                with ws.frame():
                    scratch = ws.empty(4, len(k), dim), ws.empty(len(k), codes), ws.empty(len(k))
                    closest = ws.empty(len(k), dtype=torch.int64)
                    _find_codes(self, (slot, head, at), k, centres, lengths, *scratch, closest)
                    ops.copy_(self.assigned[slot, head, at : at + len(k)], closest)

    def reset(self, slot: int) -> None:
        super().reset(slot)
        self.coded[slot] = 0
        self._load()

    def parts(self, slot: int) -> Iterator[torch.Tensor]:
        for state in (self.groups, self.since, self.coded, self.sizes):
            yield as_bytes(state[slot])
        for head, coded in enumerate(self.coded[slot].tolist()):
            yield as_bytes(self.assigned[slot, head, :coded])


@op
def _turn_to(state: ByCodes, rows: Rows, q: torch.Tensor, turned_: torch.Tensor, scratch_: torch.Tensor) -> None:
    """Queries (n, heads, dim) at their positions, as they look at tokens that were not turned, all as far away."""
    turned_.copy_(q)
    half = state.half
    paths = None if rows.paths is None else (rows.paths[: len(q)] >= 0).sum(1).tolist()
    for row, (slot, position) in enumerate(rows.places[: len(q)].tolist()):
        if paths is not None:
            position = int(state.pages.tokens[slot]) + paths[row] - 1
        cos, sin, a, b = (part[..., :half] for part in scratch_)
        torch.mul(state.angles[:half], state.method.distance - position, out=sin[0])
        torch.cos(sin[0], out=cos[0])
        torch.sin(sin[0], out=sin[0])
        rotate_(turned_[row : row + 1], cos[:1], sin[:1], state.interleaved, a[None], b[None])


@op
def _centres(book: torch.Tensor, metric: torch.Tensor, centres_: torch.Tensor, lengths_: torch.Tensor) -> None:
    """The codebook as it is weighed, and half of its squared lengths."""
    torch.mm(book, metric, out=centres_)
    torch.linalg.vector_norm(centres_, dim=1, out=lengths_).square_().div_(2)


@op
def _find_codes(
    state: ByCodes,
    where: tuple[int, int, int],
    k_: torch.Tensor,
    centres: torch.Tensor,
    lengths: torch.Tensor,
    scratch_: torch.Tensor,
    products_: torch.Tensor,
    best_: torch.Tensor,
    closest_: torch.Tensor,
) -> None:
    """The codes of keys (n, dim) of a sequence and head from a place on, which are turned back first."""
    (slot, head, at), half, count = where, state.half, len(k_)
    cos, sin, a, b = (part[:, :half] for part in scratch_)
    places = state.pages.positions
    positions = torch.arange(at, at + count) if places is None else places[slot, head, at : at + count]
    torch.mul(-positions.float()[:, None], state.angles[:half], out=sin)
    torch.cos(sin, out=cos)
    torch.sin(sin, out=sin)
    rotate_(k_[:, None], cos, sin, state.interleaved, a[:, None], b[:, None])
    torch.mm(k_, state.metric[head], out=scratch_[0])
    torch.mm(scratch_[0], centres.T, out=products_)
    products_.sub_(lengths)
    torch.max(products_, dim=1, out=(best_, closest_))
