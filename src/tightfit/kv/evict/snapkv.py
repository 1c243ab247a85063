"""What the last queries look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.method import Evictor, Seen

if TYPE_CHECKING:
    import torch


@technique(
    seam="kv",
    name="snapkv",
    paper="https://arxiv.org/abs/2404.14469",
    exact=False,
    summary="the tokens that the last queries look at, with their neighbours",
)
@dataclass(frozen=True)
class SnapKV(Evictor):
    """The last ``window`` tokens, and those that received most attention from them, smoothed over ``kernel``
    neighbours.

    The paper scores once, when the whole prompt is there (the ``layered`` schedule), and keeps everything that is
    generated. In chunks, the last queries of each chunk score what is there (with those of the chunk before, where a
    chunk is shorter than the window), and what is generated is judged after every 32 tokens by the last ``window``
    queries, so that the cache never grows.
    """

    window: int = 64  # type: ignore[misc]
    kernel: int = 5

    observes: ClassVar[str] = "last"

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(
                f"snapkv cannot use a window of {self.window} and a kernel of {self.kernel}",
                "Give a window of 1 or more, and an odd kernel.",
            )
        super().__post_init__()

    def protected(self, keep: int) -> tuple[int, int]:
        return 0, min(self.window, keep - 1) if keep > 1 else self.window  # at least that is kept by a share

    def scores(self, seen: Seen) -> torch.Tensor:
        from torch.nn.functional import avg_pool1d

        for mass, count in zip(seen.mass, seen.counts, strict=True):
            judged = max(count - self.window, 0)
            mass[judged:] = 0.0
        return avg_pool1d(seen.mass[:, None], self.kernel, 1, self.kernel // 2)[:, 0]
