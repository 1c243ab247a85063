"""Layers that read what another one keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.fitted import Findings, Fitted, Observed, Progress

if TYPE_CHECKING:
    import torch

    from tightfit.kv.base import LayerLayout

SAMPLE = 64  # tokens of a part of the text, each computed from the first position on
SAMPLES = 30


@technique(
    seam="kv",
    name="kvsharer",
    paper="https://arxiv.org/abs/2410.18517",
    exact=False,
    summary="a share of the layers reads the keys and values of earlier, unlike ones, found once with a text",
    calibration="a text (`tightfit fit`)",
)
@dataclass(frozen=True)
class KVSharer(Fitted):
    """A share ``share`` of the layers, rounded to whole ones, computes and keeps no keys and values of its own, and
    reads those of an earlier layer.

    Which ones is found by `tightfit fit`: keys and values of each layer are averaged over parts of a text, pairs of
    layers are tried from the largest Euclidean distance to the smallest, and the later one reads the earlier one's if
    the final hidden states stay closer to the original ones than ``threshold``, a cosine, until as many share as are
    wanted. Only layers with the same shapes, rotation and window can share. What methods judge tokens by is summed over
    the layers that read them; think chooses channels by the queries of the layer that computes them.

    The cache is smaller by exactly that share. Of the paper's claims the embedded model does not show that unlike
    layers share best: it loses less when similar ones do.
    """

    share: float = 0.25
    threshold: float = 0.5

    roles: ClassVar[tuple[str, ...]] = ("layers",)
    about: ClassVar[str] = "layers"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or not -1 <= self.threshold <= 1:
            raise UsageError(
                f"kvsharer cannot let a share of {self.share:g} of the layers share, above a cosine of "
                f"{self.threshold:g}",
                "Give a share between 0 and 1, and a threshold from -1 to 1.",
            )

    def wanted(self, layers: int) -> int:
        """How many of the layers share."""
        return min(round(self.share * layers), layers - 1)

    def refusal(self, layout: LayerLayout) -> str | None:
        return "each layer of latent attention makes other keys of its latents" if layout.shared else None

    def fit(self, model: Observed, progress: Progress) -> Findings:
        samples = model.samples(SAMPLE, SAMPLES)
        layers = len(model.layouts)
        wanted = self.wanted(layers)
        means = [_means([(sample.turned()[1], sample.v) for sample in each]) for each in model.layers(samples)]
        pairs = [
            (a, b)
            for a, b in combinations(range(layers), 2)
            if model.kinds[a] is not None and model.kinds[a] == model.kinds[b]
        ]
        pairs.sort(key=lambda pair: -_distance(means[pair[0]], means[pair[1]]))
        found, similarity = self._owners(model, samples, pairs, progress)
        shared = sum(owner != layer for layer, owner in enumerate(found))
        if shared < wanted:
            raise UsageError(
                f"only {shared} layers of {model.name} can share above a cosine of {self.threshold:g}, "
                f"{wanted} are wanted",
                "Ask for a smaller share, or a lower threshold.",
            )
        tokens = sum(len(sample) for sample in samples)
        readers = [f"{layer} that of {owner}" for layer, owner in enumerate(found) if layer != owner]
        lines = [
            f"{shared} of {layers} layers read what another keeps: {', '.join(readers)}",
            f"hidden states stay similar to {similarity:.3f} in {tokens} tokens",
        ]
        import torch

        report = {"tokens": tokens, "owners": found, "similarity": similarity}
        return Findings({"owners": torch.tensor(found)}, report, lines)

    def _owners(
        self, model: Observed, samples: list[list[int]], pairs: list[tuple[int, int]], progress: Progress
    ) -> tuple[list[int], float]:
        """Of each layer the one whose keys and values it reads, when ``pairs`` of layers are tried in this order, and
        how similar final hidden states stay."""
        originals = [model.hidden(sample) for sample in samples]
        layers = len(model.layouts)
        found, similarity = list(range(layers)), 1.0
        for tried, (earlier, later) in enumerate(pairs):
            if layers - len(set(found)) == self.wanted(layers):
                break
            if found[later] == later:
                # Layers that read the later one's read what that reads from now on.
                owners = [found[earlier] if owner == later else owner for owner in found]
                reached = _similarity(model, samples, originals, owners)
                if reached > self.threshold:
                    found, similarity = owners, reached
            progress(tried + 1, len(pairs))
        return found, similarity

    def check(self, tensors: Mapping[str, torch.Tensor], layers: int) -> bool:
        owners = tensors["owners"].tolist()
        fits = len(owners) == layers and all(0 <= owner <= layer for layer, owner in enumerate(owners))
        fits = fits and all(owners[owner] == owner for owner in owners)
        return fits and sum(owner != layer for layer, owner in enumerate(owners)) == self.wanted(layers)


def _means(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (tokens, kv_heads, dim) of a layer, averaged over texts of the same length."""
    keys, values = (sum(both[1:], both[0].clone()) / len(both) for both in zip(*samples, strict=True))
    return keys, values


def _distance(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Between the mean keys and values of two layers: the mean over tokens and heads."""
    return sum(float((a - b).norm(dim=-1).mean()) for a, b in zip(one, other, strict=True)) / 2


def _similarity(model: Observed, samples: list[list[int]], originals: list[torch.Tensor], owners: list[int]) -> float:
    """The mean cosine of final hidden states with the original ones, each of a whole part of the text."""
    from torch.nn.functional import cosine_similarity

    total = 0.0
    for sample, original in zip(samples, originals, strict=True):
        hidden = model.hidden(sample, owners)
        total += float(cosine_similarity(hidden.flatten(), original.flatten(), dim=0))
    return total / len(samples)
