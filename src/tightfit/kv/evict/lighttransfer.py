"""Lazy layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.method import Streamer


@technique(
    seam="kv",
    name="lighttransfer",
    paper="https://arxiv.org/abs/2410.13846",
    exact=False,
    summary="layers that look at first and recent tokens most keep only those; the prompt says which layers",
)
@dataclass(frozen=True)
class LightTransfer(Streamer):
    """A share ``lazy_share`` of the layers, rounded to whole ones, keeps the first ``sinks`` and the last ``recent``
    tokens: those whose last ``window`` queries gave most of their attention to just these tokens.

    They are found while the prompt is computed: as soon as more layers were computed than may keep everything, the
    laziest of them lets go, so that there is never one more than that (LightTransfer-Test, the version without
    training). The paper sees the whole prompt (the ``layered`` schedule); chunk by chunk, layers are found in the first
    chunk behind which there are more tokens than a lazy layer keeps, and of a shorter prompt the last half counts as
    recent.

    On the embedded model with ``recent=124`` all look-ups in 1500 tokens that are right with all bytes are right with
    half, and the divergence is 0.0008 nats. Of every second layer, the even ones cost 0.03 nats, and the odd ones, as
    the least lazy half does, nearly all look-ups.
    """

    recent: int = 1020
    lazy_share: float = 0.5
    window: int = 64  # type: ignore[misc]

    joined: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.lazy_share <= 1 or self.window < 1:
            raise UsageError(
                f"lighttransfer cannot find a share of {self.lazy_share:g} lazy layers by {self.window} queries",
                "Give lazy_share=0 to lazy_share=1, and window=1 or more.",
            )
        super().__post_init__()

    @property
    def streaming_share(self) -> float:
        return self.lazy_share

    def lazy(self, layers: int) -> int:
        return round(self.lazy_share * layers)
