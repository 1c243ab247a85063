"""Few features of all tokens but the most recent ones, fitted layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.catalog import spec_string, technique
from tightfit.errors import UsageError
from tightfit.kernels.codec import Codec
from tightfit.kv.fitted import Findings, Fitted, Known, Observed, Progress
from tightfit.kv.method import Demoter, Method, Quantizer, Seen

if TYPE_CHECKING:
    import torch

    from tightfit.kv.base import LayerLayout
    from tightfit.kv.lower import LowerStore

LENGTH, SAMPLES = 512, 16  # tokens of a text, and texts that are looked at
BITS = (2, 4, 8, 16)


@technique(
    seam="kv",
    name="cskv",
    paper="https://arxiv.org/abs/2409.10593",
    exact=False,
    summary="a recent window as it is, and of older tokens few features of all heads together, fitted layer by layer",
    calibration="a text (`tightfit fit`)",
)
@dataclass(frozen=True)
class CSKV(Demoter, Fitted):
    """The last ``keep`` tokens stay as they are. Older ones go on with a share ``keys`` and ``values`` of the features
    of a layer's heads together, in ``bits`` bits each (16: in the cache's own type).

    `tightfit fit` finds the matrices to these features and back that change the keys and values of a text least, in the
    sum of squares: what the paper comes near to by gradient descent from the singular vectors of the weights are the
    singular vectors of the keys and values themselves. Keys are projected after they were turned; the paper projects
    them before, and turns all of them again whenever they are read: on the embedded model a quarter of the features of
    keys diverges by 0.28 nats, and by 0.06 if they were projected before. It trains with the bits that it stores; here
    they are rounded afterwards.

    The paper's fifth is too little for the embedded model, whose layers have 128 features of keys and of values: it
    diverges by 0.34 nats and finds none of 6 numbers hidden in 500 tokens; two fifths diverge by 0.09 and find 5. The
    fit beats singular vectors of the weights with two fifths (of values alone and no window, 0.12 against 0.15 nats),
    and not with one (0.63 against 0.55).
    """

    keep: float = 32
    keys: float = 0.2
    values: float = 0.2
    bits: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keys <= 1 or not 0 < self.values <= 1 or self.bits not in BITS:
            raise UsageError(
                f"cskv cannot keep shares of {self.keys:g} and {self.values:g} of the features in {self.bits} bits",
                f"Give shares above 0 and up to 1, and bits={', '.join(map(str, BITS[:-1]))} or {BITS[-1]}.",
            )
        if self.budget != "uniform":
            raise UsageError("cskv keeps the same tokens in all heads and layers", "Leave the budget out.")

    # ---- which tokens stay as they are ----

    def protected(self, keep: int) -> tuple[int, int]:
        return 0, keep

    def scores(self, seen: Seen) -> torch.Tensor:
        return seen.positions.float()

    # ---- what is kept of the others ----

    def refusal(self, layout: LayerLayout) -> str | None:
        return "what latent attention keeps has few features already" if layout.shared else None

    def excludes(self, other: Method) -> str | None:
        return "has bits of its own (cskv(bits=4))" if isinstance(other, Quantizer) else None

    def lower(self, layout: LayerLayout, as_they_are: int) -> tuple[Codec, Codec]:
        bits = as_they_are if self.bits == 16 else self.bits
        key_rank, value_rank = self.ranks(layout)
        return Codec(bits, key_rank, per_channel=True), Codec(bits, value_rank, per_channel=False)

    def merges(self, layout: LayerLayout) -> int:
        return layout.kv_heads

    def ranks(self, layout: LayerLayout) -> tuple[int, int]:
        """How many features of keys and of values older tokens of a layer have."""
        shares = (self.keys, layout.key_dim), (self.values, layout.value_dim)
        key_rank, value_rank = (max(round(share * layout.kv_heads * dim), 1) for share, dim in shares)
        return key_rank, value_rank

    # ---- what is found ----

    def fitted_by(self) -> str:
        return spec_string(CSKV(keys=self.keys, values=self.values))

    def fit(self, model: Observed, progress: Progress) -> Findings:
        from tightfit.kv.lowrank.bases import Moments

        tensors: dict[str, torch.Tensor] = {}
        kept: list[float] = []
        samples = model.samples(LENGTH, SAMPLES)
        for layer, (layout, seen) in enumerate(zip(model.layouts, model.layers(samples), strict=True)):
            dims = layout.key_dim, layout.value_dim
            for kind, dim, rank in zip(("keys", "values"), dims, self.ranks(layout), strict=True):
                moments = Moments(1, layout.kv_heads * dim)
                for sample in seen:
                    x = sample.turned()[1] if kind == "keys" else sample.v
                    moments.add(x.flatten(1)[:, None])
                first = moments.principal(centered=False)[:, :, :rank]
                tensors[f"{kind}.{layer}"] = first.view(layout.kv_heads, dim, rank)
                kept.append(moments.share(first))
            progress(layer + 1, len(model.layouts))
        share = sum(kept) / len(kept)
        report = {"tokens": sum(map(len, samples)), "kept": share}
        return Findings(tensors, report, [f"of squared keys and values {share:.1%} are kept, on average of the layers"])

    def check(self, tensors: Mapping[str, torch.Tensor], layers: int) -> bool:
        return f"values.{layers - 1}" in tensors and f"values.{layers}" not in tensors

    def prepare(self, layer: int, store: LowerStore, known: Known) -> None:
        if not store.projected:
            return
        found = known.of(self)
        store.to_keys.copy_(found[f"keys.{layer}"])
        store.to_queries.copy_(found[f"keys.{layer}"])
        store.to_values.copy_(found[f"values.{layer}"])
        store.from_values.copy_(found[f"values.{layer}"].mT)
