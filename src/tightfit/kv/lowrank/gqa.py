"""Key-value heads merged into fewer, as a model with grouped queries has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.fitted import Findings, Observed, Progress
from tightfit.kv.lowrank.projector import Projector

if TYPE_CHECKING:
    import torch

    from tightfit.kv.base import LayerLayout
    from tightfit.kv.lowrank.features import Maps

LENGTH, SAMPLES = 512, 16  # tokens of a text, and texts that are looked at


@technique(
    seam="kv",
    name="gqa",
    paper="https://arxiv.org/abs/2406.07056",
    exact=False,
    summary="each few key-value heads merged into one, by the singular vectors of what they keep of a text",
    calibration="a text (`tightfit fit`)",
)
@dataclass(frozen=True)
class GQA(Projector):
    """Each ``merge`` neighbouring key-value heads are one: as many features as a head has, in the directions in which
    the keys, and the values, of all of them together vary most over a text.

    Queries are multiplied with their head's rows of the same matrix, and outputs with its transpose, which the paper
    puts into the projections. Keys are merged after they were turned: a matrix that merges them before would stand
    between queries and rotation. The paper goes on to tune the model; here nothing else changes.

    On the embedded model one head of two diverges by 0.09 nats from both, where their mean does by 1.74; but of 6
    numbers hidden in 500 tokens it finds none. `int4`, in fewer bytes, diverges by 0.0004 and finds all.
    """

    merge: int = 2

    changes: ClassVar[tuple[str, ...]] = ("features", "heads")

    def __post_init__(self) -> None:
        if self.merge < 2:
            raise UsageError(f"gqa cannot merge each {self.merge} heads into one", "Give merge=2 or more.")

    def refusal(self, layout: LayerLayout) -> str | None:
        if layout.kv_heads % self.merge:
            return f"a layer's {layout.kv_heads} key-value heads are not groups of {self.merge}"
        return super().refusal(layout)

    def fit(self, model: Observed, progress: Progress) -> Findings:
        from tightfit.kv.lowrank.bases import Moments

        tensors: dict[str, torch.Tensor] = {}
        kept = []
        samples = model.samples(LENGTH, SAMPLES)
        for layer, seen in enumerate(model.layers(samples)):
            layout = model.layouts[layer]
            reason = self.refusal(layout)
            if reason is not None:
                raise UsageError(f"gqa cannot be fitted: {reason}", "Merge another number of heads.")
            for kind, dim in (("keys", layout.key_dim), ("values", layout.value_dim)):
                moments = Moments(layout.kv_heads // self.merge, self.merge * dim)
                for sample in seen:
                    x = sample.turned()[1] if kind == "keys" else sample.v
                    moments.add(x.reshape(len(x), -1, self.merge * dim))
                first = moments.principal(centered=False)[:, :, :dim]
                tensors[f"{kind}.{layer}"] = first
                kept.append(moments.share(first))
            progress(layer + 1, len(model.layouts))
        share = sum(kept) / len(kept)
        report = {"tokens": sum(map(len, samples)), "merge": self.merge, "kept": share}
        return Findings(tensors, report, [f"of squared keys and values {share:.1%} are kept, on average of the layers"])

    def check(self, tensors: Mapping[str, torch.Tensor], layers: int) -> bool:
        return f"values.{layers - 1}" in tensors and f"values.{layers}" not in tensors

    def maps(self, layouts: Sequence[LayerLayout], tensors: Mapping[str, torch.Tensor]) -> list[Maps]:
        import torch

        from tightfit.kv.lowrank.features import Maps

        made = []
        for layer, layout in enumerate(layouts):
            keys, values = tensors[f"keys.{layer}"], tensors[f"values.{layer}"]
            outputs = values.unflatten(1, (self.merge, layout.value_dim)).flatten(0, 1).mT
            made.append(Maps(keys, values, outputs, torch.zeros(layout.kv_heads, layout.value_dim)))
        return made
