"""Qwen 3 (https://arxiv.org/abs/2505.09388): a norm on each head's queries and keys, no biases by default."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.rope import rope_parameters
from tightfit.model.families import common
from tightfit.model.families.qwen2 import windows
from tightfit.model.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, Parts


def spec(config: Config, names: Collection[str]) -> ModelSpec:
    hidden, dim = config.integer("hidden_size"), config.integer("head_dim", 128)
    attention = AttentionSpec(
        heads=config.integer("num_attention_heads"),
        kv_heads=common.kv_heads(config),
        head_dim=dim,
        scale=dim**-0.5,
        rope=common.rope(rope_parameters(config)["full_attention"], dim),
        qk_norm="head",
    )
    mlp = MlpSpec(config.integer("intermediate_size"), common.activation(config, default="silu"))
    bias = config.flag("attention_bias", False)
    layers = []
    for index, window in enumerate(windows(config)):
        parts = Parts(f"model.layers.{index}.")
        common.pre_norms(parts, hidden)
        common.qkvo(parts, attention, hidden, qkv_bias=bias, o_bias=bias)
        common.head_norms(parts, dim)
        common.gated_mlp(parts, hidden, mlp.intermediate_size)
        layers.append(LayerSpec(replace(attention, window=window), mlp, tuple(parts.params)))
    return common.model(config, layers, common.outer(config))
