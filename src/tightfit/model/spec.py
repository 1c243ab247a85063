"""What an architecture is: the parts of a decoder and where their numbers stand in a checkpoint.

A family file turns ``config.json`` into a :class:`ModelSpec`. Nothing here imports torch: a plan is made from it before
anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from tightfit.checkpoints.rope import RopeParameters

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh", "relu", "clamped_swiglu"]


@dataclass(frozen=True)
class Source:
    """Where the numbers of a parameter stand: a tensor, and which part of it.

    The named tensor is first indexed by ``expert`` in its leading dimension if ``stacked``, then transposed if
    ``transposed``, and of its rows every ``step``-th from ``start`` is taken. A ``{expert}`` in ``key`` names one
    tensor for each expert instead.
    """

    key: str
    start: int = 0
    step: int = 1
    transposed: bool = False
    stacked: bool = False


@dataclass(frozen=True)
class Param:
    """One parameter of a layer, or of the model around the layers.

    ``shape`` is ``(rows, cols)`` for a matrix that multiplies as ``x @ W.T`` and ``(n,)`` for a vector; ``experts`` is
    how many matrices or vectors of that shape there are in a mixture. ``exact`` parameters are never stored in fewer
    bits (routers). ``add`` is added to a vector when it is loaded (Gemma's norms multiply by ``1 + weight``).
    """

    name: str
    shape: tuple[int, ...]
    source: Source
    experts: int = 0
    exact: bool = False
    add: float = 0.0

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @property
    def count(self) -> int:
        """How many numbers it has."""
        total = max(self.experts, 1)
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of the first ``dim`` features of a head (after RoFormer, https://arxiv.org/abs/2104.09864).

    ``interleaved`` pairs neighbouring features instead of the two halves.
    """

    dim: int
    parameters: RopeParameters
    interleaved: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention. ``window`` counts the keys that a query sees, itself included; with ``past`` it does
    not see itself, and nothing at the first token."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec | None
    window: int | None = None
    qk_norm: Literal["none", "head", "all"] = "none"
    softcap: float | None = None
    clip_qkv: float | None = None
    past: bool = False

    @property
    def key_dim(self) -> int:
        return self.head_dim

    @property
    def value_dim(self) -> int:
        return self.head_dim


@dataclass(frozen=True)
class LatentAttentionSpec:
    """Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434).

    The cache holds one latent of ``kv_lora_rank`` features and one rotated key of ``qk_rope_head_dim`` for each token;
    the up-projections are multiplied into the queries and the outputs, so values are a view of the keys.
    """

    heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    scale: float
    rope: RopeSpec
    norm_eps: float
    window: None = None
    past: Literal[False] = False

    @property
    def kv_heads(self) -> int:
        return 1

    @property
    def key_dim(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def value_dim(self) -> int:
        return self.kv_lora_rank


@dataclass(frozen=True)
class MlpSpec:
    """A gated feed-forward layer: ``down(act(gate(x)) * up(x))``."""

    intermediate_size: int
    activation: Activation = "silu"


@dataclass(frozen=True)
class MoeSpec:
    """A mixture of experts.

    ``scoring`` turns router logits into scores: ``softmax`` over all experts, ``sigmoid``, or ``topk_softmax`` over the
    chosen ones only. Groups: of ``n_group`` groups only the best ``topk_group`` take part, a group being scored by its
    best expert (``group_score="max"``) or by the sum of its best two (``"top2"``). A parameter ``router_correction`` is
    added to the scores when experts are chosen, not to their weights.
    """

    experts: int
    experts_per_token: int
    intermediate_size: int
    activation: Activation = "silu"
    scoring: Literal["softmax", "sigmoid", "topk_softmax"] = "softmax"
    normalize: bool = False
    scaling: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2"] = "max"
    shared_intermediate_size: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: attention, then a feed-forward part, each added to the residual stream.

    Which norms it has follows from its parameters: ``input_layernorm`` and ``pre_feedforward_layernorm`` before a part,
    ``post_attention_layernorm`` and ``post_feedforward_layernorm`` on what a part gives (these are our names; family
    files map the checkpoint's). ``owner`` is the layer whose keys and values it reads, an earlier or a later one, if
    that is not itself: it then has no projections for its own.
    """

    attention: AttentionSpec | LatentAttentionSpec
    mlp: MlpSpec | MoeSpec
    params: tuple[Param, ...]
    residual_multiplier: float = 1.0
    owner: int | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for layers that compute alike: one of each kind is enough to measure a step."""
        shapes = tuple((param.name, param.shape, param.experts) for param in self.params)
        return (self.attention, self.mlp, shapes, self.residual_multiplier, self.owner is None)


@dataclass(frozen=True)
class ModelSpec:
    """A whole decoder. ``params`` are those outside of the layers: ``embed_tokens``, ``norm`` and, unless the
    embeddings are tied, ``lm_head``. Where layers read a later one's keys and values, a prompt's chunk goes through
    them ``passes`` times, or with None as often as it has tokens."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    params: tuple[Param, ...]
    context: int
    rms_norm_eps: float
    embedding_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    passes: int | None = 1

    @property
    def owners(self) -> list[int]:
        """Of each layer the one whose keys and values it reads."""
        return [index if layer.owner is None else layer.owner for index, layer in enumerate(self.layers)]

    @property
    def shares(self) -> bool:
        """Whether layers were trained to read other layers' keys and values."""
        return any(layer.owner is not None for layer in self.layers)

    @cached_property
    def stretches(self) -> tuple[tuple[range, bool], ...]:
        """All layers in order, and whether those of a stretch are computed together more than once: from one that reads
        a later layer to the last that one of them reads."""
        owners, found, start = self.owners, [], 0
        while start < len(owners):
            stop, again = start + 1, owners[start] > start
            if again:
                while stop <= max(owners[start:stop]):
                    stop = max(owners[start:stop]) + 1
            found.append((range(start, stop), again))
            start = stop
        return tuple(found)

    def part(self, layers: Sequence[int]) -> ModelSpec:
        """The model with some of its layers alone, those that they read among them."""
        places = {layer: place for place, layer in enumerate(layers)}
        chosen = [self.layers[index] for index in layers]
        moved = (replace(each, owner=None if each.owner is None else places[each.owner]) for each in chosen)
        return replace(self, layers=tuple(moved))

    @property
    def tied(self) -> bool:
        return all(param.name != "lm_head" for param in self.params)

    def all_params(self) -> Iterator[tuple[int | None, Param]]:
        """Every parameter with the index of its layer (None outside of the layers), in the order of use."""
        for param in self.params:
            if param.name == "embed_tokens":
                yield None, param
        for index, layer in enumerate(self.layers):
            for param in layer.params:
                yield index, param
        for param in self.params:
            if param.name != "embed_tokens":
                yield None, param

    @property
    def parameter_count(self) -> int:
        return sum(param.count for _, param in self.all_params())


@dataclass
class Parts:
    """Collects the parameters of one layer: a family file is a list of calls to it.

    ``prefix`` is the checkpoint's prefix of the layer, such as ``model.layers.3.``.
    """

    prefix: str
    params: list[Param] = field(default_factory=list)

    def matrix(
        self, name: str, key: str, rows: int, cols: int, *, bias: bool = False, start: int = 0, exact: bool = False
    ) -> None:
        """A matrix stored as ``prefix + key + ".weight"``, from row ``start``, with ``.bias`` beside it if it has
        one."""
        self.params.append(Param(name, (rows, cols), Source(f"{self.prefix}{key}.weight", start=start), exact=exact))
        if bias:
            self.params.append(Param(f"{name}.bias", (rows,), Source(f"{self.prefix}{key}.bias", start=start)))

    def vector(self, name: str, key: str, size: int, add: float = 0.0) -> None:
        """A vector stored as ``prefix + key``."""
        self.params.append(Param(name, (size,), Source(f"{self.prefix}{key}"), add=add))

    def experts(self, name: str, source: Source, count: int, *shape: int) -> None:
        """``count`` matrices or vectors of ``shape``, one for each expert; the prefix is put before the source's
        key."""
        placed = replace(source, key=f"{self.prefix}{source.key}")
        self.params.append(Param(name, shape, placed, experts=count))
