"""What queries of a layer see beside its pages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import Pages, Rows, Run
from tightfit.kv.entries import InFile
from tightfit.kv.merge.tokens import leaving


@dataclass(frozen=True)
class Going:
    """Tokens of a sequence that leave: of the certain ones of ``upper`` and of the run behind them all but those that
    stay, indices (kv_heads, n) int32, of each head ``counts`` (-1: all stay). They received ``given`` (kv_heads, m)
    float32 from the queries that are observed, and queries to come see those of ``seen`` (kv_heads, m) bool."""

    slot: int
    upper: Pages
    run: Run
    staying: torch.Tensor
    counts: list[int]
    given: torch.Tensor
    seen: torch.Tensor

    @property
    def totals(self) -> list[int]:
        """How many tokens each head had."""
        return [length + self.run.count for length in self.upper.lengths[self.slot].tolist()]

    def places(self, head: int, seen: bool = False) -> torch.Tensor:
        """Where a head has them: (k,) int64, ascending; only those that queries to come see, if ``seen``."""
        if self.counts[head] < 0:
            return torch.empty(0, dtype=torch.int64)
        stays = self.staying[head, : self.counts[head]].long()
        total = int(self.upper.lengths[self.slot, head]) + self.run.count
        return leaving(total, stays, self.seen[head, :total] if seen else None)


class Beside(ABC):
    """Of one layer: something of the tokens that its pages let go of. Attention over both is joined by the logarithms
    of what each softmax divides by, ``lse``."""

    repeats: ClassVar[bool] = True  # whether steps that decode as many tokens compute the same operations

    @property
    def stores(self) -> list[Pages]:
        """The pages that are read when the layer looks."""
        return []

    @abstractmethod
    def take(self, going: Going, ws: Workspace) -> None:
        """Takes over tokens that leave."""

    @abstractmethod
    def take_most(self, slot: int, upper: Pages, run: Run, ws: Workspace) -> None:
        """Takes the scratch of the most tokens that can come."""

    @abstractmethod
    def join_rows(
        self, rows: Rows, q: torch.Tensor, out_: torch.Tensor, lse_: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        """Makes of attention of rows that decode over the pages, ``out`` (n, heads, value_dim) and ``lse`` (n, heads),
        that over both."""

    @abstractmethod
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
        """:meth:`join_rows` for tokens of a prompt."""

    @abstractmethod
    def clear(self, slot: int) -> None:
        """Forgets a sequence."""

    @abstractmethod
    def parts(self, slot: int) -> Iterator[torch.Tensor | InFile]:
        """All that is kept of a sequence, as :func:`tightfit.kv.entries.parts` gives it."""
