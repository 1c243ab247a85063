"""Few bits for what the layer before does not say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from tightfit.catalog import spec_string, technique
from tightfit.errors import UsageError
from tightfit.kernels.codec import PAGE, Codec
from tightfit.kv.fitted import Findings, Fitted, Known, Observed, Progress
from tightfit.kv.lowrank.think import ThinK
from tightfit.kv.method import Demoter, Method, Rest, Seen, Selector
from tightfit.kv.share.kvsharer import KVSharer

if TYPE_CHECKING:
    import torch

    from tightfit.kv.base import LayerLayout
    from tightfit.kv.lower import LowerStore

BITS = (2, 4, 8)
SAMPLE, SAMPLES = 512, 32  # tokens of a part of the text, each computed from the first position on; and parts
DAMPING = 1e-3  # of the mean square of the inputs, as in the paper's code


@technique(
    seam="kv",
    name="aqua",
    paper="https://arxiv.org/abs/2501.19392",
    exact=False,
    summary="few bits for what linear maps of the layer before, found once with a text, miss of keys and values",
    calibration="a text (`tightfit fit`)",
)
@dataclass(frozen=True)
class Aqua(Demoter, Fitted):
    """AQUA-KV: a layer's keys are predicted by a linear map of those of the layer before, its values by its own keys
    and the values of the layer before, all heads together and keys before they are turned; what the maps miss is coded
    in ``bits``. Maps are found for, and codes made of, keys and values of the layer before as they are read, from the
    first layer on, which has no maps and ``first`` bits. Of all tokens ``keep`` stay as they are, the first ``sinks``
    and the last ones, and up to 31 more, until they fill a page.

    So does the paper's code; the codes are those of ``int2`` to ``int8`` here, HIGGS there. A step multiplies all older
    tokens by all maps, layer by layer, in room for one layer's tokens as they are. That and the maps, in bfloat16,
    count in the budget.

    On the embedded model two bits miss 1.0% of keys and 0.7% of values where the same codes without maps miss 3.8% and
    15%; the KL divergence after 1000 tokens is 0.005 nats, with maps of zeros 0.023, of ``int2`` 0.035. At equal bits
    that is what the paper claims. At equal bytes it is not met there: maps and room for one of 8 layers are 1.4 of the
    4.0 MiB (of 8), and ``int4`` reaches 0.0006 nats in 3.7. A token after 1900 others takes twenty times as long as
    with ``int2``.
    """

    keep: float = 128
    sinks: int = 4
    bits: int = 2
    first: int = 4

    roles: ClassVar[tuple[str, ...]] = ("tokens", "codec of keys", "codec of values")
    selective: ClassVar[bool] = True  # tokens leave in whole pages

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.first not in BITS:
            raise UsageError(
                f"aqua cannot code in {self.bits} bits, and the first layer in {self.first}",
                f"Give bits and first of {', '.join(map(str, BITS))}.",
            )
        if self.keep < max(self.sinks + 1, 2) or self.sinks < 0 or self.budget != "uniform":
            raise UsageError(
                f"aqua keeps the same tokens in all heads and layers, not keep={self.keep:g}, sinks={self.sinks} and "
                f"budget={self.budget}",
                "Give more tokens to keep than sinks, sinks=0 or more, and no budget.",
            )

    def excludes(self, other: Method) -> str | None:
        if isinstance(other, Selector | ThinK | Rest | KVSharer):
            return "makes all older tokens of a layer of all of them in the layer before"
        return None

    def refusal(self, layout: LayerLayout) -> str | None:
        if layout.shared or layout.past:
            return "its layers cannot be predicted one by the other"
        if layout.window is not None:
            return "layers with a window keep other tokens than those that they would be predicted by"
        if layout.rotation is None:
            return "keys are predicted before they are turned, and how far they are depends on the sequence"
        return None

    # ---- which tokens stay as they are ----

    def kept(self, tokens: int) -> int:
        return int(self.keep) + PAGE - 1

    def protected(self, keep: int) -> tuple[int, int]:
        return self.sinks, int(self.keep) - self.sinks

    def scores(self, seen: Seen) -> torch.Tensor:
        whole = max(seen.tokens - int(self.keep), 0) // PAGE * PAGE
        return seen.positions.float().masked_fill(seen.positions < self.sinks + whole, -float("inf"))

    # ---- what is kept of the others ----

    def of_layer(self, layer: int, known: Known) -> tuple[Method, ...]:
        return (replace(self, bits=self.first) if layer == 0 else self,)

    def lower(self, layout: LayerLayout, as_they_are: int) -> tuple[Codec, Codec]:
        return self.codecs(layout.key_dim, layout.value_dim)

    def codecs(self, key_dim: int, value_dim: int) -> tuple[Codec, Codec]:
        return Codec(self.bits, key_dim, per_channel=True), Codec(self.bits, value_dim, per_channel=False)

    def store(
        self, before: LowerStore | None, layout: LayerLayout, most: int, longest: int, *others: Any
    ) -> LowerStore:
        from tightfit.kv.predicted import PredictedStore

        assert before is None or isinstance(before, PredictedStore)
        more = PAGE - 1  # of what may be kept, fewer are as soon as a page is whole
        return PredictedStore(before, self.sinks, self, layout, most + more, longest + more, *others)

    def prepare(self, layer: int, store: LowerStore, known: Known) -> None:
        from tightfit.kv.predicted import PredictedStore

        if isinstance(store, PredictedStore) and store.before is not None:
            found = known.of(self)
            for name, of_store in (("keys", store.key_map), ("values", store.value_map)):
                of_store.load(found[f"{name}.{layer}"], found[f"{name}.offset.{layer}"])

    # ---- what is found ----

    def fitted_by(self) -> str:
        return spec_string(Aqua(sinks=self.sinks, bits=self.bits, first=self.first))

    def fit(self, model: Observed, progress: Progress) -> Findings:
        samples = model.samples(SAMPLE, SAMPLES)
        tokens, layers = sum(map(len, samples)), len(model.layouts)
        if max(map(len, samples)) < self.sinks + PAGE:
            raise UsageError(f"aqua is fitted with parts of {self.sinks + PAGE} tokens or more", "Give more --context.")
        widest = max(layout.kv_heads * (layout.key_dim + layout.value_dim) for layout in model.layouts)
        model.take_room(4 * 4 * tokens * widest + 3 * 8 * widest**2, f"fitting maps with {tokens} tokens")
        tensors: dict[str, torch.Tensor] = {}
        before: Coded | None = None
        shares: dict[str, list[float]] = {"keys": [], "values": []}
        for layer, (layout, seen) in enumerate(zip(model.layouts, model.layers(samples), strict=True)):
            reason = self.refusal(layout)
            if reason is not None:
                raise UsageError(f"this model cannot use aqua: {reason}", "Use another method.")
            keys, values = (
                pages_of([sample.k for sample in seen], self.sinks),
                pages_of([s.v for s in seen], self.sinks),
            )
            method = self if layer else replace(self, bits=self.first)
            before = method.coded(keys, values, before)
            for name, linear in (("keys", before.key_map), ("values", before.value_map)):
                if linear is not None:
                    tensors[f"{name}.{layer}"], tensors[f"{name}.offset.{layer}"] = linear.matrix, linear.offset
                    shares[name].append(linear.share)
            progress(layer + 1, layers)
        lines = [
            f"in {tokens} tokens the layer before says of the variance of {name} {sum(each) / max(len(each), 1):.1%}, "
            f"from {min(each, default=0):.1%} to {max(each, default=0):.1%}"
            for name, each in shares.items()
        ]
        return Findings(tensors, {"tokens": tokens, "said": shares}, lines)

    def check(self, tensors: Mapping[str, torch.Tensor], layers: int) -> bool:
        last = layers - 1
        return (last == 0 or f"values.{last}" in tensors) and f"values.{layers}" not in tensors

    def coded(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        before: Coded | None,
        maps: tuple[LinearMap, LinearMap] | None = None,
    ) -> Coded:
        """Keys and values (n, kv_heads, dim) of whole pages, keys not turned, as they are read where the layer before
        is read as ``before``, with these ``maps`` or those that are best for them."""
        import torch

        from tightfit.kv.quantize.rounding import rounded

        key_codec, value_codec = self.codecs(keys.shape[2], values.shape[2])
        if before is None:
            return Coded(rounded(keys, key_codec), rounded(values, value_codec), None, None)
        key_map = linear_map(before.keys, keys) if maps is None else maps[0]
        said = key_map.apply(before.keys).view_as(keys)
        keys = said + rounded(keys - said, key_codec)
        both = torch.cat([keys.flatten(1), before.values.flatten(1)], 1)
        value_map = linear_map(both, values) if maps is None else maps[1]
        said = value_map.apply(both).view_as(values)
        return Coded(keys, said + rounded(values - said, value_codec), key_map, value_map)


class LinearMap(NamedTuple):
    """``matrix`` (m, k) in bfloat16 and ``offset`` (m,), and what ``share`` of the variance they say of what they were
    found for."""

    matrix: torch.Tensor
    offset: torch.Tensor
    share: float

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """(n, m) of ``x`` (n, ...) with k numbers each."""
        return x.flatten(1) @ self.matrix.float().T + self.offset


class Coded(NamedTuple):
    """Keys, not turned, and values (n, kv_heads, dim) of a layer as they are read, and its maps, if it has some."""

    keys: torch.Tensor
    values: torch.Tensor
    key_map: LinearMap | None
    value_map: LinearMap | None


def linear_map(x: torch.Tensor, y: torch.Tensor) -> LinearMap:
    """The map of ``x`` (n, ...) to ``y`` (n, ...) that misses least squares."""
    import torch

    inputs, wanted = x.flatten(1).double(), y.flatten(1).double()
    of_inputs, of_wanted = inputs.mean(0), wanted.mean(0)
    inputs, centred = inputs - of_inputs, wanted - of_wanted
    products = inputs.T @ inputs
    products += DAMPING * products.diagonal().mean().clamp(min=1e-30) * torch.eye(len(products), dtype=torch.float64)
    matrix = torch.linalg.solve(products, inputs.T @ centred).T.bfloat16()
    offset = of_wanted - matrix.double() @ of_inputs
    missed = (centred - inputs @ matrix.double().T).square().sum()
    return LinearMap(matrix, offset.float(), float(1 - missed / centred.square().sum().clamp(min=1e-30)))


def pages_of(parts: Sequence[torch.Tensor], sinks: int) -> torch.Tensor:
    """The tokens of whole pages behind the first ``sinks``, of all parts (n, heads, dim) of a text."""
    import torch

    return torch.cat([part[sinks : sinks + (len(part) - sinks) // PAGE * PAGE] for part in parts])
