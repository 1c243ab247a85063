"""One layer and one sequence whose tokens are merged, driven by queries, keys and values."""

from __future__ import annotations

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import Run
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.fitted import NOTHING, Known
from tightfit.kv.paged import PagedCache
from tightfit.model.batch import Batch, Segment

ROOM = 1 << 26
HEADS, DIM, VALUES = 2, 8, 6  # key-value heads, as many query heads
LAYOUT = LayerLayout(HEADS, DIM, VALUES, 512, heads=HEADS)
Kept = dict[int, tuple[torch.Tensor, torch.Tensor]]  # by position: key and value


class Driver:
    """One layer, and sequence 0."""

    def __init__(
        self,
        kv: str,
        layout: LayerLayout = LAYOUT,
        ws: Workspace | None = None,
        tail: int = 1,
        known: Known = NOTHING,
        context: int = 512,
    ) -> None:
        arena = Arena(ROOM)
        self.cache = PagedCache([layout], compose(kv), context, 1, torch.float32, arena, tail=tail, known=known)
        self.ws, self.layout, self.bytes = ws or Workspace(Arena(ROOM)), layout, arena.used

    def add(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decode: bool = False) -> torch.Tensor:
        """Computes attention of tokens, of which a prompt's are certain then."""
        if not decode:
            self.cache.begin(0, self.start)
        count, start, layout = len(k), self.start, self.layout
        out = torch.zeros(count, layout.heads, layout.value_dim)
        batch = Batch((Segment(0, start, [0] * count, decode),))
        with self.ws.frame():
            held = self.cache.update(0, batch, q.clone(), k, None if layout.shared else v, None, self.ws)
            self.cache.attend_step(0, batch, held, q, out, self.ws, Scoring(1.0, layout.window))
        if not decode:
            self.cache.prefilled(0, start, start + count)
        return out

    @property
    def start(self) -> int:
        return int(self.cache.tokens[0])

    def commit(self, count: int) -> None:
        self.cache.commit(0, range(count), self.ws)

    def kept(self, head: int) -> Kept:
        layer = self.cache.layers[0]
        length = int(layer.lengths[0, head])
        nothing = Run(torch.empty(HEADS, 1, DIM), torch.empty(HEADS, 1, VALUES), 0)
        with self.ws.frame():
            k, v = pages.read(layer, 0, head, nothing, 0, length, self.ws)
            if self.layout.shared:
                v = k[:, :VALUES]
            assert layer.positions is not None
            return dict(
                zip(layer.positions[0, head, :length].tolist(), zip(k.clone(), v.clone(), strict=True), strict=True)
            )


def tokens(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, HEADS, dim, generator=generator) for dim in (DIM, DIM, VALUES))  # type: ignore[return-value]


def assert_same(found: Kept, wanted: Kept) -> None:
    assert list(found) == list(wanted)
    for position, pair in wanted.items():
        for mine, theirs in zip(found[position], pair, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
