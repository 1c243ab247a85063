"""OLMo 2 (https://arxiv.org/abs/2501.00656): norms after each part instead of before it, and on the queries and keys of
all heads together."""

from __future__ import annotations

from collections.abc import Collection

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.rope import rope_parameters
from tightfit.model.families import common
from tightfit.model.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, Parts


def spec(config: Config, names: Collection[str]) -> ModelSpec:
    hidden, dim = config.integer("hidden_size"), common.head_dim(config)
    attention = AttentionSpec(
        heads=config.integer("num_attention_heads"),
        kv_heads=common.kv_heads(config),
        head_dim=dim,
        scale=dim**-0.5,
        rope=common.rope(rope_parameters(config)["full_attention"], dim),
        qk_norm="all",
    )
    mlp = MlpSpec(config.integer("intermediate_size"), common.activation(config, default="silu"))
    bias = config.flag("attention_bias", False)
    layers = []
    for index in range(config.integer("num_hidden_layers")):
        parts = Parts(f"model.layers.{index}.")
        common.qkvo(parts, attention, hidden, qkv_bias=bias, o_bias=bias)
        parts.vector("q_norm", "self_attn.q_norm.weight", attention.heads * dim)
        parts.vector("k_norm", "self_attn.k_norm.weight", attention.kv_heads * dim)
        parts.vector("post_attention_layernorm", "post_attention_layernorm.weight", hidden)
        common.gated_mlp(parts, hidden, mlp.intermediate_size)
        parts.vector("post_feedforward_layernorm", "post_feedforward_layernorm.weight", hidden)
        layers.append(LayerSpec(attention, mlp, tuple(parts.params)))
    return common.model(config, layers, common.outer(config), eps=1e-5)
