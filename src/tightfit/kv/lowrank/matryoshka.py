"""Orthogonal projections of keys and values, trained so that any number of their first features will do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tightfit.catalog import spec_string, technique
from tightfit.errors import UsageError
from tightfit.kv.fitted import Findings, Observed, Progress
from tightfit.kv.lowrank.projector import Projector

if TYPE_CHECKING:
    import torch

    from tightfit.kv.base import LayerLayout
    from tightfit.kv.lowrank.features import Maps

PARTS = 8  # a head's features come and go in so many steps
LENGTH, SAMPLES = 256, 64  # tokens of a text, and texts that are learned from
LOOKED_AT = 16  # texts whose principal components are the start
AT_ONCE = 2  # texts of a step of training, and those that ranks are searched with


def step_of(dim: int) -> int:
    """How many of ``dim`` features come and go at once."""
    return max(dim // PARTS, 1)


@technique(
    seam="kv",
    name="matryoshka",
    paper="https://arxiv.org/abs/2410.14731",
    exact=False,
    summary="keys and values in fewer features, of orthogonal projections that were trained with all ranks at once",
    calibration="a text (`tightfit fit`)",
)
@dataclass(frozen=True)
class Matryoshka(Projector):
    """A share ``share`` of the features of keys and values is kept: the first ones of each head, after an orthogonal
    projection of its own.

    `tightfit fit` starts from principal components (of keys after they were turned, as in the paper's code) and trains
    the projections of all heads together for ``steps`` steps: the model's predictions with random ranks in each layer
    and head are to be those with all features. Then features are let go of, an eighth of a layer's keys or values at a
    time, where the final hidden states change least. That order is kept with the projections, so that one file serves
    every ``share``. The paper's ranks differ between the heads of a layer; here they do not, since heads of a layer lie
    in pages of one width. Keys and values have ranks of their own.

    On the embedded model, with the same ranks in all layers, 300 steps of 256 tokens bring the divergence of principal
    components from 0.52 to 0.34 nats with 3 of 8 features and from 0.22 to 0.16 with 4; with 6 it rises from 0.04 to
    0.05, since what few features lose is most of the loss: a large ``share`` is better off with ``steps=0``.
    """

    share: float = 0.5
    steps: int = 150

    def __post_init__(self) -> None:
        if not 1 / PARTS <= self.share <= 1 or self.steps < 0:
            raise UsageError(
                f"matryoshka cannot keep a share of {self.share:g} of the features after {self.steps} steps",
                f"Give a share from {1 / PARTS:g} to 1, and no fewer than 0 steps.",
            )

    def fitted_by(self) -> str:
        return spec_string(replace(self, share=Matryoshka.share))

    def ranks(self, layouts: Sequence[LayerLayout], order: Sequence[int]) -> list[tuple[int, int]]:
        """Of each layer how many features of keys and of values stay, if they go in ``order``: even numbers stand for
        the keys of a layer, odd ones for values."""
        kept = [[layout.key_dim, layout.value_dim] for layout in layouts]
        heads = [layout.kv_heads for layout in layouts]
        total = sum(count * sum(dims) for count, dims in zip(heads, kept, strict=True))
        left = total
        for each in order:
            if left <= self.share * total:
                break
            layer, kind = divmod(each, 2)
            step = step_of((layouts[layer].key_dim, layouts[layer].value_dim)[kind])
            kept[layer][kind] -= step
            left -= heads[layer] * step
        return [(keys, values) for keys, values in kept]

    def maps(self, layouts: Sequence[LayerLayout], tensors: Mapping[str, torch.Tensor]) -> list[Maps]:
        from tightfit.kv.lowrank.features import Maps

        made = []
        for layer, (key_rank, value_rank) in enumerate(self.ranks(layouts, tensors["order"].tolist())):
            keys, mean = tensors[f"keys.{layer}"], tensors[f"means.{layer}"]
            first = tensors[f"values.{layer}"][:, :, :value_rank]
            shift = mean - (mean[:, None] @ first @ first.mT)[:, 0]
            made.append(Maps(keys[:, :, :key_rank], first, first.mT, shift))
        return made

    def check(self, tensors: Mapping[str, torch.Tensor], layers: int) -> bool:
        return "order" in tensors and f"keys.{layers - 1}" in tensors and f"keys.{layers}" not in tensors

    def fit(self, model: Observed, progress: Progress) -> Findings:
        import torch

        from tightfit.kv.lowrank.nested import Nested, search

        samples = torch.tensor(model.samples(LENGTH, SAMPLES))
        network = model.network()
        self._take_room(model, network.logits(network.hidden(samples[:1, :1])).shape[-1])
        nested = Nested(model.layouts, *_principal(model, samples[:LOOKED_AT].tolist()))
        goings = sum(
            -(-dim // step_of(dim)) - 1 for layout in model.layouts for dim in (layout.key_dim, layout.value_dim)
        )
        generator, losses = torch.Generator().manual_seed(0), []
        for step in range(self.steps):
            picked = torch.randperm(len(samples), generator=generator)[:AT_ONCE]
            losses.append(nested.train(network, samples[picked], generator, 1 - step / self.steps))
            progress(step + 1, self.steps + goings)
        with torch.no_grad():
            order = search(
                nested, network, samples[:AT_ONCE], lambda gone: progress(self.steps + gone, self.steps + goings)
            )
            tensors = {"order": torch.tensor(order, dtype=torch.int32)}
            for layer, mean in enumerate(nested.means):
                keys, values = nested.matrices(layer)
                tensors |= {f"keys.{layer}": keys, f"values.{layer}": values, f"means.{layer}": mean}
        report: dict[str, float | int] = {"tokens": samples.numel(), "steps": self.steps}
        if not losses:
            return Findings(tensors, report, [])
        first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
        lines = [
            f"divergence from the model with random ranks: {first:.3f} nats in the first steps, {last:.3f} in the last"
        ]
        return Findings(tensors, report | {"first_nats": first, "last_nats": last}, lines)

    def _take_room(self, model: Observed, vocab: int) -> None:
        """For what gradients of a step need: of each token its scores and features in each layer, and predictions."""
        of_layers = sum(layout.heads * (4 * LENGTH + 24 * layout.key_dim) for layout in model.layouts)
        model.take_room(4 * AT_ONCE * LENGTH * (of_layers + 6 * vocab), "training")


def _principal(
    model: Observed, samples: list[list[int]]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Of each layer the principal components of its keys and of its values, and the mean of its values."""
    from tightfit.kv.lowrank.bases import Moments

    keys, values, means = [], [], []
    for layout, scoring, seen in zip(model.layouts, model.scorings, model.layers(samples), strict=True):
        of_keys, of_values = Moments(layout.kv_heads, layout.key_dim), Moments(layout.kv_heads, layout.value_dim)
        for sample in seen:
            of_keys.add(sample.turned()[1])
            of_values.add(sample.v)
        forgotten = scoring.softcap is None and scoring.sinks is None  # the mean of keys, by a softmax
        keys.append(of_keys.principal(centered=forgotten))
        values.append(of_values.principal(centered=True))
        means.append(of_values.mean())
    return keys, values, means
