"""What a selector knows of the tokens of one layer, and what it is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import Looking, Pages, Rows
from tightfit.kv.base import LayerLayout
from tightfit.kv.reading import Names


@dataclass(frozen=True)
class Where:
    """A layer that is selected from: ``most`` tokens of each head at most, of which ``tail`` may be tentative, and the
    arena that state is made in. ``known`` is what the method knows of the model, or None where it is only planned;
    ``names`` is what the text names, for methods that go by it."""

    layer: int
    pages: Pages
    layout: LayerLayout
    sequences: int
    most: int
    tail: int
    arena: Arena
    known: Mapping[str, torch.Tensor] | None = None
    names: Names | None = None


@dataclass(frozen=True)
class Settled:
    """What became of a sequence's tokens: ``count`` of a prompt's chunk are certain now (0: those that decoded since
    the last time). Where some were let go of, ``indices`` (kv_heads, n) say of each that is kept where it was,
    ``counts`` of them for each head. ``whole`` says whether the prompt is."""

    count: int
    whole: bool
    indices: torch.Tensor | None = None
    counts: Sequence[int] | None = None


class Selecting(ABC):
    """State lies in the arena. What :meth:`look` computes it computes in operations, from tensors that are the same at
    every step: a step is recorded, and repeated with other numbers in them."""

    @abstractmethod
    def look(self, rows: Rows, looking: Looking, ws: Workspace, scoring: Scoring) -> Looking:
        """How rows that decode look: at what is chosen, in scratch memory of the enclosing frame. Rows may be drafts,
        of which each depends only on those before it on its path."""

    joins: ClassVar[bool] = False  # whether rows see more than what they are told to look at

    def join_rows(  # noqa: B027
        self, rows: Rows, looking: Looking, out_: torch.Tensor, lse_: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        """Makes of attention of rows over what they were told to look at, ``out`` (n, heads, value_dim) and ``lse`` (n,
        heads), that over all that they see."""

    @abstractmethod
    def among(self, slot: int) -> list[int]:
        """Of how many tokens of each head the next one chooses; it sees all that came later."""

    def index_bytes(self, slot: int) -> int:
        """What choosing reads, of all heads."""
        return 0

    def settled(self, slot: int, now: Settled, ws: Workspace) -> None:  # noqa: B027 (many keep nothing)
        """Tokens of a sequence became certain, and are in their pages. In a dry run it takes the most scratch that it
        may ever take, and does nothing."""

    def commit(self, slot: int, path: Sequence[int]) -> None:  # noqa: B027
        """Of the tentative tokens those of ``path`` are certain."""

    def reset(self, slot: int) -> None:  # noqa: B027
        """Forgets a sequence."""

    def parts(self, slot: int) -> Iterator[torch.Tensor]:
        """All state of a sequence, as flat uint8 tensors."""
        yield from ()


def room_for_lists(n: int, kv_heads: int, count: int, ws: Workspace) -> tuple[torch.Tensor, torch.Tensor]:
    """For n rows what they look at: up to ``count`` listed tokens (n, kv_heads, count) of each head, and all from
    (n, kv_heads) on."""
    return ws.empty(n, kv_heads, count, dtype=torch.int32), ws.empty(n, kv_heads, dtype=torch.int32)
