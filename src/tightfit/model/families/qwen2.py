"""Qwen 2 and 2.5 (https://arxiv.org/abs/2407.10671): llama with biases on queries, keys and values, and a sliding
window in some layers where the checkpoint asks for it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.rope import rope_parameters
from tightfit.model.families import common
from tightfit.model.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, Parts


def windows(config: Config) -> list[int | None]:
    """The sliding window of each layer, None where it sees everything."""
    if not config.flag("use_sliding_window", False):
        return [None] * config.integer("num_hidden_layers")
    window = config.optional_integer("sliding_window", 4096)
    first = config.integer("max_window_layers", 28, minimum=0)  # the layers below it see everything
    types = common.layer_types(config, lambda index: index >= first)
    return [window if kind == "sliding_attention" else None for kind in types]


def spec(config: Config, names: Collection[str]) -> ModelSpec:
    hidden, dim = config.integer("hidden_size"), common.head_dim(config)
    attention = AttentionSpec(
        heads=config.integer("num_attention_heads"),
        kv_heads=common.kv_heads(config),
        head_dim=dim,
        scale=dim**-0.5,
        rope=common.rope(rope_parameters(config)["full_attention"], dim),
    )
    mlp = MlpSpec(config.integer("intermediate_size"), common.activation(config, default="silu"))
    layers = []
    for index, window in enumerate(windows(config)):
        parts = Parts(f"model.layers.{index}.")
        common.pre_norms(parts, hidden)
        common.qkvo(parts, attention, hidden, qkv_bias=True)
        common.gated_mlp(parts, hidden, mlp.intermediate_size)
        layers.append(LayerSpec(replace(attention, window=window), mlp, tuple(parts.params)))
    return common.model(config, layers, common.outer(config))
