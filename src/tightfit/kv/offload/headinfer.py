"""Heads brought from a file one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.method import Method, Selector, Tier

if TYPE_CHECKING:
    from tightfit.budget.ledger import Arena
    from tightfit.kernels.pages import Pages, Staging


@technique(
    seam="kv",
    name="headinfer",
    paper="https://arxiv.org/abs/2502.12574",
    exact=True,
    summary="the cache lies in a file; heads come into memory in turn, the next while one is computed",
)
@dataclass(frozen=True)
class HeadInfer(Tier):
    """All tokens but the last ``resident`` lie in a file, and ``heads`` heads of the whole model have theirs in memory:
    while one is looked at, a thread reads the next ones, of this layer and then of the layer that follows, the first
    after the last. So memory for a context does not grow with the layers, in prompts and when decoding.

    Pages go to the file in blocks that are summed up at once, so results have the bits of a cache in memory where
    nothing is coded. The paper brings heads from host memory to a GPU; here they come from a disk to memory. What it
    claims is met to the bit; what it costs is that each token reads all of the file.
    """

    resident: int = 128
    heads: int = 2

    step: ClassVar[int] = 4  # 128 tokens, which attention sums up at once

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 2:
            raise UsageError(
                f"headinfer cannot work with {self.heads} heads in memory",
                "Give heads=2 or more: one that is looked at, and those that are read meanwhile.",
            )

    def excludes(self, other: Method) -> str | None:
        return "reads heads whole" if isinstance(other, Selector) else None

    def stage(self, layers: Sequence[Pages], selected: Sequence[bool], arena: Arena) -> list[Staging]:
        from tightfit.kernels import pages

        nbytes = self.heads * max(pages.head_bytes(each) for each in layers)
        return pages.stage_heads(layers, self.heads, arena.take(nbytes))
