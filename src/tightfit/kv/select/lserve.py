"""Heads that stream beside heads that read the pages that bounds of parts of them choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kernels.codec import PAGE
from tightfit.kv.evict.gates import Gated
from tightfit.kv.method import Selector

if TYPE_CHECKING:
    from tightfit.kv.select.selecting import Selecting, Where


@technique(
    seam="kv",
    name="lserve",
    paper="https://arxiv.org/abs/2502.14866",
    exact=False,
    summary="half of the heads keep a window, the others read few pages, chosen by the bounds of their parts",
    calibration="a text (`tightfit fit`)",
)
@dataclass(frozen=True)
class LServe(Gated, Selector):
    """The share ``retrieval`` of all key-value heads keeps everything, and of that a token that decodes sees ``tokens``
    tokens in pages of 32, and what came since the pages were last complete; the other heads keep the first ``sinks``
    and the last ``recent`` tokens. So what a token reads of keys and values does not grow with the context.

    The lowest and highest keys are known of each ``size`` tokens of a page, and a page counts as much as the part that
    allows the largest score: bounds of few tokens are tight, and reading many at once is fast. Pages are chosen anew
    when tokens become certain (a prompt's, and 32 that were decoded) and at every ``every``-th token after that; the
    tokens between read the same ones.

    Heads are found by `tightfit fit`, as those of ``duo``. The paper has pages of 64 tokens in parts of 16, reads 4096
    tokens of them, and has heads that stream keep more recent tokens while a prompt is computed than afterwards; here
    they see all of their own chunk of it. Few bits, which the paper has too, are a codec's (``lserve+int4``).

    On the embedded model 103 of 120 look-ups in 2000 tokens are right and 34 of 80 in 3700; with everything 105 and 34,
    so two points are not passed, of the six that so many questions can tell. With parts of 8 tokens, the paper's share
    of a page, it is 102 and 31, and with bounds of whole pages 91 of the 120. As many pages are read at both lengths:
    with their bounds 29% and 17% of the bytes, where heads that stream alone leave 64% and 59%. Bounds take a fourth of
    what they bound. Choosing at every token reads a third more and has a sixth of the divergence (0.017 nats, 0.107).
    Bytes were counted; seconds were not measured.
    """

    tokens: int = 512
    full: int = 0
    retrieval: float = 0.5
    size: int = 4
    every: int = 4

    roles: ClassVar[tuple[str, ...]] = ("tokens", "selector")
    unit: ClassVar[int] = PAGE

    def __post_init__(self) -> None:
        super().__post_init__()
        Selector.__post_init__(self)
        if self.size not in (2, 4, 8, 16, 32) or self.every < 1:
            raise UsageError(
                f"lserve cannot choose by parts of {self.size} tokens, every {self.every} tokens",
                "Give size=2, 4, 8, 16 or 32, and every=1 or more.",
            )

    @property
    def bounds(self) -> int:
        return PAGE // self.size

    def select(self, where: Where) -> Selecting:
        from tightfit.kv.select.by_bounds import Reused

        return Reused(where, self.tokens // PAGE, self.every)
