"""Tokens of a head that are read to be merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import ops, pages
from tightfit.kernels.pages import Pages, Run
from tightfit.kv.method import Tokens

READ_AT_ONCE = 256  # tokens of a head that are read into float32 to merge them


def leaving(total: int, stays: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """Of ``total`` tokens the places (k,) int64 of those that do not stay at ``stays`` (m,) int64; of them those that
    are ``seen`` (total,) bool, if that is given."""
    leaves = torch.ones(total, dtype=torch.bool) if seen is None else seen.clone()
    leaves[stays] = False
    return leaves.nonzero()[:, 0]


@dataclass(frozen=True)
class TokensAt:
    """Tokens of a head and of a run behind it, at ``places`` (n,) int64, ascending."""

    pages: Pages
    sequence: int
    head: int
    run: Run
    places: torch.Tensor
    ws: Workspace

    @property
    def count(self) -> int:
        return len(self.places)

    def only(self, which: torch.Tensor) -> TokensAt:
        """Those of them that ``which`` (m,) int64 names, ascending."""
        return replace(self, places=self.places[which])

    def blocks(self) -> Iterator[Tokens]:
        """All of them in float32, some at a time, in scratch memory until the next ones are asked for."""
        at, ws = 0, self.ws
        while at < len(self.places):
            first = int(self.places[at])
            stop = int(torch.searchsorted(self.places, first + READ_AT_ONCE))
            with ws.frame():
                last = int(self.places[stop - 1])
                k, v = pages.read(self.pages, self.sequence, self.head, self.run, first, last + 1, ws)
                rows, count = self.places[at:stop] - first, stop - at
                keys, values = ws.empty(count, k.shape[1]), ws.empty(count, v.shape[1])
                ops.gather_rows(k, rows, keys)
                ops.gather_rows(v, rows, values)
                yield Tokens(keys, None if self.pages.shared else values)
            at = stop
