"""Channels of keys, pruned by what the queries need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.method import Method

if TYPE_CHECKING:
    import torch

    from tightfit.kv.base import LayerLayout


@technique(
    seam="kv",
    name="think",
    paper="https://arxiv.org/abs/2407.21018",
    exact=False,
    summary="the channels of keys that contribute most to the scores of the last queries",
)
@dataclass(frozen=True)
class ThinK(Method):
    """Lets go of a share ``prune`` of each key head's channels: those with the smallest product of the mean squares of
    the last ``window`` queries and of the keys. The last ``recent`` tokens keep all channels.

    The paper chooses with the whole prompt (the ``layered`` schedule); in chunks, the first chunk chooses for its
    sequence. What is generated loses the same channels once it is no longer recent (in the paper it keeps them).
    """

    prune: float = 0.4
    window: int = 32
    recent: int = 32

    roles: ClassVar[tuple[str, ...]] = ("channels of keys",)

    def __post_init__(self) -> None:
        if not 0 < self.prune < 1 or self.window < 1 or self.recent < 0:
            raise UsageError(
                f"think cannot prune {self.prune:g} of the channels by {self.window} queries",
                "Give a share between 0 and 1, a window of 1 or more, and recent=0 or more.",
            )

    def kept(self, channels: int) -> int:
        """How many of the channels stay."""
        return channels - int(channels * self.prune)

    def choose(self, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The channels (kv_heads, kept) int32 that stay, ascending, judged by the last queries ``q`` (n, heads, dim)
        and by ``keys`` (kv_heads, tokens, dim)."""
        import torch

        kv_heads, _, dim = keys.shape
        wanted = q[-self.window :].float().square().mean(0).view(kv_heads, -1, dim).mean(1)
        there = torch.stack([head.float().square().mean(0) for head in keys])
        order = (wanted * there).argsort(dim=1, descending=True, stable=True)
        return order[:, : self.kept(dim)].sort(dim=1).values.to(torch.int32)

    def refusal(self, layout: LayerLayout) -> str | None:
        return "values of latent attention are part of its keys, which think would prune" if layout.shared else None
