"""SmolLM3 (https://huggingface.co/blog/smollm3): llama in which some layers have no rotary embedding
(https://arxiv.org/abs/2501.18795)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.rope import rope_parameters
from tightfit.model.families import common
from tightfit.model.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, Parts


def rotated(config: Config) -> tuple[bool, ...]:
    """Which layers rotate queries and keys. ``no_rope_layers`` is 1 for those that do, in spite of its name."""
    count = config.integer("num_hidden_layers")
    interval = config.integer("no_rope_layer_interval", 4)
    implied = tuple(int((index + 1) % interval != 0) for index in range(count))
    flags = config.integers("no_rope_layers", implied, minimum=0)
    if len(flags) < count or max(flags) > 1:
        raise config.wrong("no_rope_layers", f"0 or 1 for each of {count} layers")
    return tuple(flag == 1 for flag in flags[:count])


def spec(config: Config, names: Collection[str]) -> ModelSpec:
    hidden, dim = config.integer("hidden_size"), common.head_dim(config)
    attention = AttentionSpec(
        heads=config.integer("num_attention_heads"),
        kv_heads=common.kv_heads(config),
        head_dim=dim,
        scale=dim**-0.5,
        rope=common.rope(rope_parameters(config, default_theta=2_000_000.0)["full_attention"], dim),
    )
    mlp = MlpSpec(config.integer("intermediate_size"), common.activation(config, default="silu"))
    bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    rotates = rotated(config)
    window = config.optional_integer("sliding_window")
    slides = window is not None and config.flag("use_sliding_window", False)
    types = common.layer_types(config, lambda index: slides and not rotates[index])
    layers = []
    for index, kind in enumerate(types):
        parts = Parts(f"model.layers.{index}.")
        common.pre_norms(parts, hidden)
        common.qkvo(parts, attention, hidden, qkv_bias=bias, o_bias=bias)
        common.gated_mlp(parts, hidden, mlp.intermediate_size, bias=mlp_bias)
        own = replace(
            attention,
            rope=attention.rope if rotates[index] else None,
            window=window if kind == "sliding_attention" else None,
        )
        layers.append(LayerSpec(own, mlp, tuple(parts.params)))
    return common.model(config, layers, common.outer(config, tied=True))
