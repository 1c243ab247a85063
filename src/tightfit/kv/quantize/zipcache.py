"""Salient tokens in more bits than others, and few numbers beside the codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kernels.codec import Codec
from tightfit.kv.method import Coder, Demoter, Seen

if TYPE_CHECKING:
    import torch

    from tightfit.kv.base import LayerLayout

BITS = (2, 4, 8)
SMALLEST = 1e-6  # that a channel is divided by


@technique(
    seam="kv",
    name="zipcache",
    paper="https://arxiv.org/abs/2405.14256",
    exact=False,
    summary="salient tokens in more bits than others; channels of values are normalised once, a token has one scale",
)
@dataclass(frozen=True)
class ZipCache(Demoter, Coder):
    """``keep`` tokens of each head, those with the highest mean attention from the ``window`` last queries that could
    see them (the probes), are kept in ``bits``, all others in ``low`` bits; the last ``recent`` stay as they are.

    Codes of keys are by channel, for each page of 32 tokens; those of values are channel-separable: each channel is
    divided by the square root of its largest magnitude in the first chunk of a sequence, and a token then has one scale
    and one minimum. (The paper codes keys by channel for the whole prompt, and so again for every 100 tokens. Keys that
    were turned cannot be normalised by what came first: channels that turn slowly have not met their range then.) The
    paper's probes are the last queries and as many at random; here they are the last ones of each chunk, and of 32
    tokens that are generated.

    On the embedded model values take fewer bytes than in groups, but two stores take more than one, and at equal bytes
    nothing is gained: with 3% of 3900 tokens salient it diverges by 0.14 nats in 3.7 of 16 MiB, ``int2`` by 0.12 in
    4.1; with 99% by 0.006 in 7.0 MiB, ``int4`` by 0.003 in 6.2. Hidden numbers are found as with those.
    """

    keep: float = 0.6
    recent: int = 128
    bits: int = 4  # type: ignore[misc]
    low: int = 2
    window: int = 64  # type: ignore[misc]

    roles: ClassVar[tuple[str, ...]] = ("tokens", "codec of keys", "codec of values")
    observes: ClassVar[str] = "last"

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.low not in BITS or self.recent < 0 or self.window < 1:
            raise UsageError(
                f"zipcache cannot use bits={self.bits}, low={self.low}, window={self.window} and recent={self.recent}",
                f"Give bits and low of {', '.join(map(str, BITS))}, a window of 1 or more and recent=0 or more.",
            )
        super().__post_init__()

    def protected(self, keep: int) -> tuple[int, int]:
        return 0, min(self.recent, max(keep - 1, 1))

    def scores(self, seen: Seen) -> torch.Tensor:
        """The mean over the probes that stand at a token or behind it: their sum alone would favour first tokens."""
        return seen.mass / (seen.tokens - seen.positions.clamp(min=seen.since))

    def codec(self, dim: int, of_keys: bool, as_they_are: int) -> Codec:
        return _codec(self.bits, dim, of_keys)

    def lower(self, layout: LayerLayout, as_they_are: int) -> tuple[Codec, Codec]:
        return _codec(self.low, layout.key_dim, True), _codec(self.low, layout.value_dim, False)

    def table(self, codec: Codec, numbers: torch.Tensor, q: torch.Tensor, of_keys: bool) -> torch.Tensor:
        import torch

        factors = numbers.abs().amax(1).float().sqrt()
        return torch.cat([torch.zeros_like(factors), factors.clamp(min=SMALLEST)], 1)


def _codec(bits: int, dim: int, of_keys: bool) -> Codec:
    return Codec(bits, dim, per_channel=True) if of_keys else Codec(bits, dim, False, group=dim, affine=True)
