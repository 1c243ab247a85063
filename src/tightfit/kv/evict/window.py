"""Sinks and a recent window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.method import Evictor, Seen

if TYPE_CHECKING:
    import torch

    from tightfit.kv.base import LayerLayout


@technique(
    seam="kv",
    name="window",
    paper="https://arxiv.org/abs/2309.17453",
    exact=False,
    summary="the first tokens and a recent window, with positions counted inside the cache",
)
@dataclass(frozen=True)
class Window(Evictor):
    """The first ``sinks`` tokens and the last ``keep - sinks``, the query's own included (StreamingLLM).

    With ``positions=cache`` a query stands at its place in the cache, as in the paper, so that no distance is longer
    than ``keep``: since rotary embeddings only see distances, it is enough to turn the queries that look at the sinks.
    With ``positions=original`` it stands where it stands in the text. What a query sees is exact for every token,
    whatever the chunks; memory is given back in blocks of 32. Layers in which the model has a window of its own have no
    sinks, since it never saw them there.
    """

    sinks: int = 4
    positions: str = "cache"

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UsageError("window keeps a number of tokens, not a share", "Give for example keep=512.")
        if self.positions not in ("cache", "original"):
            raise UsageError(f"there are no positions {self.positions!r}", "Use positions=cache or positions=original.")
        if self.budget != "uniform":
            raise UsageError(f"window has no scores that budget={self.budget} could go by", "Leave the budget out.")
        super().__post_init__()

    @property
    def anchors(self) -> int:  # type: ignore[override]
        return self.sinks

    def protected(self, keep: int) -> tuple[int, int]:
        return self.sinks, max(keep - self.sinks, 1)

    def scores(self, seen: Seen) -> torch.Tensor:
        return seen.positions.float()

    def refusal(self, layout: LayerLayout) -> str | None:
        if layout.shared and self.positions == "cache":
            return "latent attention turns its queries before the cache sees them: use window(positions=original)"
        return None
