"""Few bits, and what they miss: along a few directions, and outliers as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kernels.codec import PAGE, Codec
from tightfit.kv.method import Quantizer

if TYPE_CHECKING:
    import torch

    from tightfit.kv.base import LayerLayout

BITS = (2, 4, 8)
SEEN = 1024  # tokens by which directions are found, at most
WIDEST = (1 << 16) // PAGE  # channels of a page whose numbers 16 bits can name


@technique(
    seam="kv",
    name="gear",
    paper="https://arxiv.org/abs/2403.05527",
    exact=False,
    summary="few bits, what they miss along a few directions, and outliers as they are",
)
@dataclass(frozen=True)
class Gear(Quantizer):
    """Numbers are taken apart in three: a share ``outliers`` of each page of 32 tokens, those that are furthest from
    the median of their channel (of keys) or token (of values), is kept as it is; the others are coded in ``bits`` as
    ``int4`` does; and of what the codes miss each token keeps its part along ``rank`` directions, in float16.

    The paper finds both factors of the low rank anew for a prompt, and for every 20 tokens that are generated; here the
    directions of a head are the principal ones of what the codes miss in its sequence's prompt (its first chunk, in
    chunks), and only the parts along them are stored with later tokens. Its outliers are a share of each channel or
    token, here of a page.
    """

    bits: int = 2  # type: ignore[misc]
    rank: int = 2
    outliers: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS or self.rank < 0 or not 0 <= self.outliers < 0.5:
            raise UsageError(
                f"gear cannot use bits={self.bits}, rank={self.rank} and outliers={self.outliers:g}",
                f"Give bits of {', '.join(map(str, BITS))}, rank=0 or more, and a share of outliers below 0.5.",
            )

    def codec(self, dim: int, of_keys: bool, as_they_are: int) -> Codec:
        rank, outliers = min(self.rank, dim), int(self.outliers * PAGE * dim)
        return Codec(self.bits, dim, of_keys, rank=rank, outliers=outliers, wide=as_they_are // 8)

    def refusal(self, layout: LayerLayout) -> str | None:
        if max(layout.key_dim, layout.value_dim) > WIDEST:
            return f"it can name the outliers of heads of up to {WIDEST} channels"
        return None

    def table(self, codec: Codec, numbers: torch.Tensor, q: torch.Tensor, of_keys: bool) -> torch.Tensor:
        import torch

        from tightfit.kernels.pages_reference import decode, encode

        plain = Codec(codec.bits, codec.dim, codec.per_channel, outliers=codec.outliers, wide=codec.wide)
        directions = torch.zeros(len(numbers), codec.rank, codec.dim)
        for head, of_head in enumerate(numbers):
            products = torch.zeros(codec.dim, codec.dim)
            for page in of_head[: min(SEEN, of_head.shape[0] // PAGE * PAGE)].split(PAGE):
                x = page.float()
                missed = x - decode(plain, numbers.dtype, encode(plain, numbers.dtype, x))
                products += missed.T @ missed
            directions[head] = torch.linalg.eigh(products).eigenvectors.flip(1).T[: codec.rank]
        return directions.flatten(1)
