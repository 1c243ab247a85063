"""Llama (https://arxiv.org/abs/2302.13971): pre-norm, rotary grouped-query attention, gated feed-forward."""

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
        rope=common.rope(rope_parameters(config)["full_attention"], dim, config.flag("rope_interleave", False)),
    )
    mlp = MlpSpec(config.integer("intermediate_size"), common.activation(config, default="silu"))
    bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    layers = []
    for index in range(config.integer("num_hidden_layers")):
        parts = Parts(f"model.layers.{index}.")
        common.pre_norms(parts, hidden)
        common.qkvo(parts, attention, hidden, qkv_bias=bias, o_bias=bias)
        common.gated_mlp(parts, hidden, mlp.intermediate_size, bias=mlp_bias)
        layers.append(LayerSpec(attention, mlp, tuple(parts.params)))
    return common.model(config, layers, common.outer(config))
