"""The tokens that were most attended when everything was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.method import Method, Selector
from tightfit.kv.share.kvsharer import KVSharer

if TYPE_CHECKING:
    from tightfit.kv.select.selecting import Selecting, Where


@technique(
    seam="kv",
    name="recycled",
    paper="https://arxiv.org/abs/2411.05787",
    exact=False,
    summary="most decoding steps read the tokens that were most attended at the last full step",
)
@dataclass(frozen=True)
class Recycled(Selector):
    """Every ``stride``-th token that decodes sees everything: a full step. The others see the ``tokens`` tokens of each
    key-value head to which the queries of the last full step, those of the head's group together, gave most, and what
    came since. A layer has a full step sooner where the cosine of its queries with those of its last one, averaged over
    heads, falls below ``similar`` (-1: never), and after more of a prompt, or when tokens were let go of.

    Tokens are chosen among those up to the end of the prompt, or to the last multiple of 32 after it.

    Of the paper's claims the embedded model shows that asking whether queries are similar beats a fixed stride: where
    35% of steps are full ones, ``similar=0.5`` has half of the divergence of ``stride=3``. But with a stride of 16 it
    finds no more than with a window, as a query seldom looks at what the one before it did, though 64 tokens would be
    enough for each alone.
    """

    stride: int = 16
    similar: float = -1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1 or not -1 <= self.similar <= 1:
            raise UsageError(
                f"recycled cannot look at everything every {self.stride} tokens, or below a cosine of {self.similar:g}",
                "Give stride=1 or more, and similar= a number from -1 to 1.",
            )

    def reads(self, tokens: int) -> float:
        """Where queries stay similar. A full step reads keys twice: to see them, and to find out what it gives most."""
        return (tokens + (self.stride - 1) * min(self.tokens, tokens)) / self.stride

    def excludes(self, other: Method) -> str | None:
        if isinstance(other, KVSharer):
            return "recycles what one layer's queries chose, which others' would not"
        return super().excludes(other)

    def select(self, where: Where) -> Selecting:
        from tightfit.kv.select.by_last_full import ByLastFull

        return ByLastFull(where, self.tokens, self.stride, self.similar)
