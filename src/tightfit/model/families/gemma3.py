"""Gemma 3 (https://arxiv.org/abs/2503.19786), the language model: five local layers to one global, each with its own
rotary base, norms on each head's queries and keys.

The larger checkpoints wrap it beside a vision model: its configuration is then ``text_config``, and its tensors have
another prefix. transformers reads ``attn_logit_softcapping`` and does not apply it, and neither do we.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.rope import rope_parameters
from tightfit.model.families import common
from tightfit.model.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, Parts

TYPES = ("sliding_attention", "full_attention")
# what Gemma3TextConfig implies, as the wrapper's text_config leaves it out
IMPLIED = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
}
# prefix of the tensors and name of the head: of the text model alone, and of the wrapper as first and as later saved
PREFIXES = (
    ("model.", "lm_head.weight"),
    ("language_model.model.", "language_model.lm_head.weight"),
    ("model.language_model.", "lm_head.weight"),
)


def spec(config: Config, names: Collection[str]) -> ModelSpec:
    text = config.text()
    text = Config(IMPLIED | {"model_type": config.model_type} | dict(text.values), text.name, text.file)
    if text.flag("use_bidirectional_attention", False):
        raise text.wrong("use_bidirectional_attention", "false: an embedding model cannot generate text")
    prefix, head = next((pair for pair in PREFIXES if f"{pair[0]}embed_tokens.weight" in names), PREFIXES[0])
    hidden, dim = text.integer("hidden_size"), common.head_dim(text)
    ropes = rope_parameters(text, TYPES, default_theta=1_000_000.0, local_theta=10_000.0)
    attention = AttentionSpec(
        heads=text.integer("num_attention_heads"),
        kv_heads=common.kv_heads(text),
        head_dim=dim,
        scale=text.number("query_pre_attn_scalar", 256.0, above=0.0) ** -0.5,
        rope=None,
        qk_norm="head",
    )
    kinds = {kind: replace(attention, rope=common.rope(ropes[kind], dim)) for kind in TYPES}
    window = text.optional_integer("sliding_window", 4096)
    kinds["sliding_attention"] = replace(kinds["sliding_attention"], window=window)
    mlp = MlpSpec(text.integer("intermediate_size"), common.activation(text, "hidden_activation", "gelu_pytorch_tanh"))
    pattern = text.integer("sliding_window_pattern", 6)
    add = common.one_more(text)
    bias = text.flag("attention_bias", False)
    layers = []
    for index, kind in enumerate(common.layer_types(text, lambda index: (index + 1) % pattern != 0)):
        parts = Parts(f"{prefix}layers.{index}.")
        common.sandwich_norms(parts, hidden, add=add)
        common.qkvo(parts, attention, hidden, qkv_bias=bias, o_bias=bias)
        common.head_norms(parts, dim, add=add)
        common.gated_mlp(parts, hidden, mlp.intermediate_size)
        layers.append(LayerSpec(kinds[kind], mlp, tuple(parts.params)))
    return common.model(
        text,
        layers,
        common.outer(text, tied=True, norm_add=add, prefix=prefix, head=head),
        embedding_multiplier=math.sqrt(hidden),
        logit_softcap=text.optional_number("final_logit_softcapping", above=0.0),
    )
