"""Pages selected by the bounds of their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.kernels.codec import PAGE
from tightfit.kv.method import Selector

if TYPE_CHECKING:
    from tightfit.kv.select.selecting import Selecting, Where


@technique(
    seam="kv",
    name="quest",
    paper="https://arxiv.org/abs/2406.10774",
    exact=False,
    summary="decoding reads only the pages whose keys may score highest with the query",
)
@dataclass(frozen=True)
class Quest(Selector):
    """A token that decodes sees ``tokens`` tokens in pages of 32, those whose lowest and highest keys allow the largest
    score, and what came since the pages were last complete; the first ``full`` layers see everything, and prompts do.

    The paper has pages of 16 tokens, and each head chooses for itself; here heads that share keys and values read a
    page if any of them may need it. Bounds are kept in the cache's type.
    """

    unit: ClassVar[int] = PAGE

    @property
    def bounds(self) -> int:
        return 1

    def select(self, where: Where) -> Selecting:
        from tightfit.kv.select.by_bounds import ByBounds

        return ByBounds(where, self.tokens // PAGE)
