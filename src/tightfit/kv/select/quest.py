"""Pages selected by the bounds of their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.evict.window import Window
from tightfit.kv.method import Method


@technique(
    seam="kv",
    name="quest",
    paper="https://arxiv.org/abs/2406.10774",
    exact=False,
    summary="decoding reads only the pages whose keys may score highest with the query",
)
@dataclass(frozen=True)
class Quest(Method):
    """A token that decodes sees ``tokens`` tokens in pages of 32, those whose lowest and highest keys allow the largest
    score, and what came since the pages were last complete; the first ``full`` layers see everything, and prompts do.

    The paper has pages of 16 tokens and a key for each head; here heads that share keys and values read a page if any
    of them may need it. Bounds are kept in the cache's type.
    """

    tokens: int = 512
    full: int = 2

    roles: ClassVar[tuple[str, ...]] = ("selector",)

    def __post_init__(self) -> None:
        if self.tokens < 32 or self.full < 0:
            raise UsageError(
                f"quest cannot read {self.tokens} tokens, and all of them in {self.full} layers",
                "Give tokens=32 or more, and full=0 or more.",
            )

    def excludes(self, other: Method) -> str | None:
        return "chooses among pages that a window hides" if isinstance(other, Window) else None
