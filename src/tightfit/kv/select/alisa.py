"""A local window, and the tokens that the last queries look at."""

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
    name="alisa",
    paper="https://arxiv.org/abs/2403.17312",
    exact=False,
    summary="decoding reads a local window, and tokens that the last queries together gave most to",
)
@dataclass(frozen=True)
class Alisa(Selector):
    """The sparse window attention of the paper: a token that decodes reads the last tokens, a share ``local`` of
    ``tokens``, and of those before the ones to which the last ``steps`` queries gave most, all together. Sums are made
    anew after every 32 tokens, over all tokens before the window as if there were no others, also those that were not
    read meanwhile; the paper makes them at every step, of weights that the steps had.

    The paper's schedule keeps tokens, moves them, or deletes them and computes them again, by what that costs. To keep
    and to move them is a composition here: ``alisa+host(resident=...)``. To compute them again is not built. It takes
    what went into each layer, which would be kept instead of keys and values. With grouped queries that is more: in a
    Llama of a billion parameters 2048 numbers for each token and layer, where keys and values have 2 * 8 * 64 = 1024.
    Where each head has its own keys it is half, but making keys and values of ``d`` numbers takes 4 * d * d operations:
    for d = 4096 35 microseconds at the 1.9 * 10**12 a second that two cores with AMX reach in bfloat16, 512 tokens at
    once. To read both from a disk of 2.3 GB/s takes 7, so even inputs in memory would lose, from d = 830 on.

    On the embedded model a fifth of 2000 tokens finds more than a window with as many (5 look-ups of 12, 3), but
    diverges more (0.12 nats, 0.06): its queries seldom look at what the last ones did.
    """

    local: float = 0.5
    steps: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.local < 1 or self.steps < 1:
            raise UsageError(
                f"alisa cannot give a share of {self.local:g} to the last tokens, and look at {self.steps} queries",
                "Give a share from 0 to below 1, and steps=1 or more.",
            )

    @property
    def recent(self) -> int:
        return int(self.local * self.tokens)

    def reads(self, tokens: int) -> float:
        """Of those before the window. Sums read all keys ``steps`` times in 32 tokens."""
        return min(self.tokens - self.recent, tokens)

    def excludes(self, other: Method) -> str | None:
        if isinstance(other, KVSharer):
            return "sums up what one layer's queries look at, which others' do not"
        return super().excludes(other)

    def select(self, where: Where) -> Selecting:
        from tightfit.kv.select.by_last_queries import ByLastQueries

        return ByLastQueries(where, self.tokens - self.recent, self.recent, self.steps)
