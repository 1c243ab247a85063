"""What tokens are worth, known when they come and kept with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import ops
from tightfit.kernels.pages import Pages, Rows
from tightfit.kv.base import LayerLayout, Step
from tightfit.kv.method import Rater
from tightfit.kv.observed import Observed


class Rated(Observed):
    """As what all queries gave, but that tokens bring it with them."""

    def __init__(
        self,
        rater: Rater,
        prepared: Sequence[Any],
        layouts: Sequence[LayerLayout],
        widths: Sequence[int],
        of_owners: Callable[[Callable[[int], torch.Tensor]], list[torch.Tensor]],
        sequences: int,
        dtype: torch.dtype,
        arena: Arena,
    ) -> None:
        super().__init__(rater, layouts, widths, of_owners, sequences, 1, arena)
        self.rater, self.dtype, self._prepared = rater, dtype, prepared

    def rate(
        self, layer: int, step: Step, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ws: Workspace
    ) -> torch.Tensor:
        """(n, kv_heads): what a step's tokens are worth, in scratch memory of the enclosing frame."""
        worth = ws.empty(len(q), self._layouts[layer].kv_heads)
        self.rater.rate(self._prepared[layer], q, k, v, worth, step, self.dtype, ws)
        return worth

    def put(self, layer: int, kept: Pages, rows: Rows, worth: torch.Tensor) -> None:
        """Notes what rows that decode are worth, at the places to which they were appended."""
        _put(self.mass[layer][:, :, 0], kept.lengths, kept.tokens, rows.places, worth)

    def put_chunk(self, kept: Pages, slot: int, at: int, worth: torch.Tensor, given_: torch.Tensor) -> None:
        """Notes what tokens ``at`` onwards of a run are worth."""
        _put_chunk(given_[:, 0], kept.lengths[slot], at, worth)

    def straighten(self, layer: int, kept: Pages, slot: int, path: torch.Tensor) -> None:
        """The tentative tokens of ``path``, ascending, are the first ones now."""
        worth, lengths = self.mass[layer][slot, :, 0], kept.lengths[slot].long()[:, None]
        worth.scatter_(1, lengths + torch.arange(len(path)), worth.gather(1, lengths + path))


@ops.op
def _put(
    mass_: torch.Tensor, lengths: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor, worth: torch.Tensor
) -> None:
    """Writes ``worth`` (n, kv_heads) into ``mass`` (sequences, kv_heads, capacity)."""
    slots, positions = places[: len(worth)].long().unbind(1)
    at = lengths[slots] + (positions - tokens[slots])[:, None]
    mass_[slots[:, None], torch.arange(worth.shape[1]), at.long()] = worth


@ops.op
def _put_chunk(given_: torch.Tensor, lengths: torch.Tensor, start: int, worth: torch.Tensor) -> None:
    """Writes ``worth`` (n, kv_heads) into ``given`` (kv_heads, tokens), behind so many tokens of each head."""
    given_.scatter_(1, lengths.long()[:, None] + start + torch.arange(len(worth)), worth.T)
