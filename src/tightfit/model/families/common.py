"""What most families share: a plain grouped-query layer, and the embeddings, last norm and head around the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.rope import RopeParameters
from tightfit.errors import CheckpointError
from tightfit.model.spec import Activation, AttentionSpec, LayerSpec, ModelSpec, Param, Parts, RopeSpec, Source

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}


def activation(config: Config, key: str = "hidden_act", default: str | None = None) -> Activation:
    """The activation that ``key`` names."""
    name = config.string(key, default)
    if name not in ACTIVATIONS:
        raise config.wrong(key, f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def head_dim(config: Config) -> int:
    """``head_dim``, or the hidden size shared among the heads."""
    heads = config.integer("num_attention_heads")
    return config.integer("head_dim", config.integer("hidden_size") // heads)


def kv_heads(config: Config) -> int:
    """``num_key_value_heads``, or as many as query heads. Raises CheckpointError unless it divides those."""
    heads = config.integer("num_attention_heads")
    count = config.integer("num_key_value_heads", heads)
    if heads % count:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    return count


def rope(parameters: RopeParameters, dim: int, interleaved: bool = False) -> RopeSpec:
    """Rotation of the share of ``dim`` features that the parameters ask for. Raises CheckpointError if it is odd."""
    rotated = int(dim * parameters.partial_rotary_factor)
    if rotated % 2 or not rotated:
        raise CheckpointError(
            f"config.json asks for {rotated} of {dim} features of a head to be rotated: they are rotated in pairs",
            "It is damaged or was written for another version of the model: download it again.",
        )
    return RopeSpec(rotated, parameters, interleaved)


def layer_types(config: Config, slides: Callable[[int], bool]) -> tuple[str, ...]:
    """``full_attention`` or ``sliding_attention`` for each layer; in files that do not say, those slide of which
    ``slides`` says so by their index."""
    count = config.integer("num_hidden_layers")
    implied = tuple("sliding_attention" if slides(index) else "full_attention" for index in range(count))
    types = config.strings("layer_types", implied)
    if len(types) != count or not set(types) <= {"full_attention", "sliding_attention"}:
        raise config.wrong("layer_types", f"{count} times 'full_attention' or 'sliding_attention'")
    return types


def qkvo(
    parts: Parts, spec: AttentionSpec, hidden: int, *, qkv_bias: bool = False, o_bias: bool = False, kv: bool = True
) -> None:
    """Separate projections of queries, of keys and values unless not ``kv``, and output."""
    width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    parts.matrix("q_proj", "self_attn.q_proj", width, hidden, bias=qkv_bias)
    if kv:
        parts.matrix("k_proj", "self_attn.k_proj", kv_width, hidden, bias=qkv_bias)
        parts.matrix("v_proj", "self_attn.v_proj", kv_width, hidden, bias=qkv_bias)
    parts.matrix("o_proj", "self_attn.o_proj", hidden, width, bias=o_bias)


def gated_mlp(parts: Parts, hidden: int, intermediate: int, *, bias: bool = False) -> None:
    """A gated feed-forward layer."""
    parts.matrix("gate_proj", "mlp.gate_proj", intermediate, hidden, bias=bias)
    parts.matrix("up_proj", "mlp.up_proj", intermediate, hidden, bias=bias)
    parts.matrix("down_proj", "mlp.down_proj", hidden, intermediate, bias=bias)


def one_more(config: Config) -> float:
    """What Gemma's norms add to their weights: 1, which GGUF files hold already."""
    return 1.0 if config.flag("norm_weights_add_one", True) else 0.0


def pre_norms(parts: Parts, hidden: int, add: float = 0.0) -> None:
    """A norm before attention and one before the feed-forward part (which checkpoints call post_attention)."""
    parts.vector("input_layernorm", "input_layernorm.weight", hidden, add)
    parts.vector("pre_feedforward_layernorm", "post_attention_layernorm.weight", hidden, add)


def head_norms(parts: Parts, dim: int, add: float = 0.0) -> None:
    """A norm on each head's queries and one on its keys."""
    parts.vector("q_norm", "self_attn.q_norm.weight", dim, add)
    parts.vector("k_norm", "self_attn.k_norm.weight", dim, add)


def sandwich_norms(parts: Parts, hidden: int, add: float = 0.0) -> None:
    """A norm before and one after attention, and the same around the feed-forward part."""
    for name in (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ):
        parts.vector(name, f"{name}.weight", hidden, add)


def outer(
    config: Config, *, tied: bool = False, norm_add: float = 0.0, prefix: str = "model.", head: str = "lm_head.weight"
) -> tuple[Param, ...]:
    """Embeddings, the last norm and the head; ``tied`` is what an absent ``tie_word_embeddings`` means, ``prefix`` and
    ``head`` are where checkpoints keep them."""
    hidden, vocab = config.integer("hidden_size"), config.integer("vocab_size")
    params = [
        Param("embed_tokens", (vocab, hidden), Source(f"{prefix}embed_tokens.weight")),
        Param("norm", (hidden,), Source(f"{prefix}norm.weight"), add=norm_add),
    ]
    if not config.flag("tie_word_embeddings", tied):
        params.append(Param("lm_head", (vocab, hidden), Source(head)))
    return tuple(params)


def model(
    config: Config,
    layers: Sequence[LayerSpec],
    params: tuple[Param, ...],
    *,
    eps: float = 1e-6,
    embedding_multiplier: float = 1.0,
    logit_multiplier: float = 1.0,
    logit_softcap: float | None = None,
) -> ModelSpec:
    """The whole decoder; ``eps`` is what an absent ``rms_norm_eps`` means."""
    return ModelSpec(
        family=config.model_type,
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        layers=tuple(layers),
        params=params,
        context=config.integer("max_position_embeddings"),
        rms_norm_eps=config.number("rms_norm_eps", eps, above=0.0),
        embedding_multiplier=embedding_multiplier,
        logit_multiplier=logit_multiplier,
        logit_softcap=logit_softcap,
    )
