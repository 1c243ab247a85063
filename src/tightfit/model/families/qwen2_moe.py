"""Qwen 1.5 and 2 mixtures (https://arxiv.org/abs/2407.10671): qwen2 with many small experts beside a shared one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.rope import rope_parameters
from tightfit.model.families import common, mixture
from tightfit.model.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec, Parts


def sparse_layers(config: Config) -> list[bool]:
    """Which layers are mixtures."""
    dense = config.integers("mlp_only_layers", (), minimum=0)
    step = config.integer("decoder_sparse_step", 1)
    return [index not in dense and (index + 1) % step == 0 for index in range(config.integer("num_hidden_layers"))]


def windows(config: Config) -> list[int | None]:
    """The sliding window of each layer, None where it sees everything."""
    if not config.flag("use_sliding_window", False):
        return [None] * config.integer("num_hidden_layers")
    window = config.optional_integer("sliding_window", 4096)
    stop = config.integer("max_window_layers", 28, minimum=0)  # the layers from it on see everything
    types = common.layer_types(config, lambda index: index % 2 == 0 and index < stop)
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
    activation = common.activation(config, default="silu")
    count = mixture.expert_count(config, "num_experts", "num_local_experts")
    moe = MoeSpec(
        experts=count,
        experts_per_token=mixture.experts_per_token(config, count),
        intermediate_size=config.integer("moe_intermediate_size"),
        activation=activation,
        normalize=config.flag("norm_topk_prob", False),
        shared_intermediate_size=config.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    mlp = MlpSpec(config.integer("intermediate_size"), activation)
    bias = config.flag("qkv_bias", True)
    layers = []
    for index, (sparse, window) in enumerate(zip(sparse_layers(config), windows(config), strict=True)):
        parts = Parts(f"model.layers.{index}.")
        common.pre_norms(parts, hidden)
        common.qkvo(parts, attention, hidden, qkv_bias=bias)
        if sparse:
            mixture.router(parts, "mlp.gate", count, hidden)
            mixture.experts(parts, names, moe, hidden)
            mixture.shared_expert(parts, "mlp.shared_expert", hidden, moe.shared_intermediate_size)
            parts.matrix("shared_gate", "mlp.shared_expert_gate", 1, hidden, exact=True)
        else:
            common.gated_mlp(parts, hidden, mlp.intermediate_size)
        layers.append(LayerSpec(replace(attention, window=window), moe if sparse else mlp, tuple(parts.params)))
    return common.model(config, layers, common.outer(config))
