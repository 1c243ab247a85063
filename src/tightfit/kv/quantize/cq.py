"""Neighbouring channels in one code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kernels.codec import Codec
from tightfit.kv.fitted import Findings, Fitted, Observed, Progress
from tightfit.kv.lowrank.think import ThinK
from tightfit.kv.method import Method, Quantizer

if TYPE_CHECKING:
    import torch

    from tightfit.kv.base import LayerLayout

COUPLED, BITS = (1, 2, 4, 8), (1, 2, 4, 8)
SAMPLE, SAMPLES = 512, 16  # tokens of a part of the text, each computed from the first position on; and parts
STEPS = 16  # of k-means
AT_ONCE = 1 << 20  # distances


@technique(
    seam="kv",
    name="cq",
    paper="https://arxiv.org/abs/2405.03917",
    exact=False,
    summary="neighbouring channels in one code, of centroids that are found once with a text: down to a bit each",
    calibration="a text (`tightfit fit`)",
)
@dataclass(frozen=True)
class CQ(Quantizer, Fitted):
    """Coupled Quantization: each ``coupled`` neighbouring channels of a key or a value are one code of ``bits`` bits,
    the nearest of 2**bits centroids, which `tightfit fit` finds by k-means for each group of channels of each head and
    layer. Eight channels in eight bits are a bit each, four are two. The centroids count in the budget.

    The paper codes keys before they are turned; here the cache keeps them turned, and the centroids are those of turned
    keys. It weights what k-means sums up by gradients of the loss; here all tokens count alike.

    On the embedded model, at a bit a channel, coupled channels miss 12% of the variance of keys and 14% of values where
    single ones miss 29% and 37%, and the KL divergence is 0.05 against 0.10 nats. Its centroids take 2 MiB, which in a
    context of 4096 tokens is as much as ``int2`` needs in all, with 0.03 nats.
    """

    coupled: int = 4
    bits: int = 8  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coupled not in COUPLED or self.bits not in BITS:
            raise UsageError(
                f"cq cannot put {self.coupled} channels in {self.bits} bits",
                f"Give coupled and bits of {', '.join(map(str, COUPLED))}.",
            )

    def codec(self, dim: int, of_keys: bool, as_they_are: int) -> Codec:
        return Codec(self.bits, dim, per_channel=False, coupled=self.coupled)

    def refusal(self, layout: LayerLayout) -> str | None:
        if layout.shared:
            return "latent attention makes other keys of its latents, which cannot be fitted"
        if any(dim % self.coupled for dim in (layout.key_dim, layout.value_dim)):
            return f"heads of {layout.key_dim} and {layout.value_dim} channels cannot be coupled by {self.coupled}"
        return None

    def excludes(self, other: Method) -> str | None:
        return "couples channels that the other prunes" if isinstance(other, ThinK) else None

    # ---- what it must know ----

    def fitted_by(self) -> str:
        return f"cq(coupled={self.coupled},bits={self.bits})"

    def fit(self, model: Observed, progress: Progress) -> Findings:
        import torch

        samples, tensors = model.samples(SAMPLE, SAMPLES), dict[str, torch.Tensor]()
        tokens, layers = sum(map(len, samples)), len(model.layouts)
        missed: dict[str, list[float]] = {"keys": [], "values": []}
        for layer, seen in enumerate(model.layers(samples)):
            of_layer = {"keys": [sample.turned()[1] for sample in seen], "values": [sample.v for sample in seen]}
            for name, parts in of_layer.items():
                numbers = torch.cat(parts).transpose(0, 1)  # (kv_heads, tokens, dim)
                found, error = centroids(numbers, self.coupled, self.bits)
                tensors[f"{name}.{layer}"] = found
                missed[name].append(error)
            progress(layer + 1, layers)
        means = {name: sum(errors) / layers for name, errors in missed.items()}
        lines = [
            f"{self.bits / self.coupled:g} bits a channel: of the variance {means['keys']:.1%} of keys and "
            f"{means['values']:.1%} of values are missed in {tokens} tokens"
        ]
        return Findings(tensors, {"tokens": tokens, "missed": missed}, lines)

    def check(self, tensors: Mapping[str, torch.Tensor], layers: int) -> bool:
        entries = 1 << self.bits
        return all(
            tensors[f"{name}.{layer}"].shape[2:] == (entries, self.coupled)
            for name in ("keys", "values")
            for layer in range(layers)
        )


def centroids(numbers: torch.Tensor, coupled: int, bits: int) -> tuple[torch.Tensor, float]:
    """(heads, dim / coupled, 2**bits, coupled) centroids of each group of channels of ``numbers`` (heads, n, dim), and
    which share of the variance is missed with them."""
    import torch

    heads, n, dim = numbers.shape
    found, missed = torch.empty(heads, dim // coupled, 1 << bits, coupled), 0.0
    start = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    for head in range(heads):
        for group in range(dim // coupled):
            points = numbers[head, :, group * coupled : (group + 1) * coupled].float().contiguous()
            found[head, group], apart = _k_means(points, points[start[torch.arange(1 << bits) % n]])
            missed += apart
    total = float((numbers - numbers.mean(1, keepdim=True)).square().sum())
    return found, missed / max(total, 1e-30)


def _k_means(points: torch.Tensor, means: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Centroids (k, c) of ``points`` (n, c) from ``means`` on, and the sum of squared distances to the nearest. A
    centroid of which nothing is nearest goes to one of the points that are furthest from theirs."""
    import torch

    for step in range(STEPS + 1):
        parts = points.split(max(AT_ONCE // len(means), 1))
        nearest = [torch.cdist(part, means).min(1) for part in parts]
        apart, codes = (torch.cat(each) for each in zip(*nearest, strict=True))
        if step == STEPS:
            break
        counts = torch.bincount(codes, minlength=len(means))
        sums = torch.zeros_like(means).index_add_(0, codes, points)
        means = sums / counts[:, None].clamp(min=1)
        empty = (counts == 0).nonzero()[:, 0][: len(points)]
        means[empty] = points[apart.topk(len(empty)).indices]
    return means, float(apart.square().sum())
