"""Qwen 3 mixtures (https://arxiv.org/abs/2505.09388): qwen3 with many small experts and no shared one."""

from __future__ import annotations

from collections.abc import Collection

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.rope import rope_parameters
from tightfit.model.families import common, mixture
from tightfit.model.families.qwen2_moe import sparse_layers
from tightfit.model.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec, Parts


def spec(config: Config, names: Collection[str]) -> ModelSpec:
    hidden, dim = config.integer("hidden_size"), common.head_dim(config)
    slides = config.flag("use_sliding_window", False)
    attention = AttentionSpec(
        heads=config.integer("num_attention_heads"),
        kv_heads=common.kv_heads(config),
        head_dim=dim,
        scale=dim**-0.5,
        rope=common.rope(rope_parameters(config)["full_attention"], dim),
        window=config.optional_integer("sliding_window", 4096) if slides else None,
        qk_norm="head",
    )
    activation = common.activation(config, default="silu")
    count = mixture.expert_count(config, "num_experts", "num_local_experts")
    moe = MoeSpec(
        experts=count,
        experts_per_token=mixture.experts_per_token(config, count),
        intermediate_size=config.integer("moe_intermediate_size"),
        activation=activation,
        normalize=config.flag("norm_topk_prob", False),
    )
    mlp = MlpSpec(config.integer("intermediate_size"), activation)
    bias = config.flag("attention_bias", False)
    layers = []
    for index, sparse in enumerate(sparse_layers(config)):
        parts = Parts(f"model.layers.{index}.")
        common.pre_norms(parts, hidden)
        common.qkvo(parts, attention, hidden, qkv_bias=bias, o_bias=bias)
        common.head_norms(parts, dim)
        if sparse:
            mixture.router(parts, "mlp.gate", count, hidden)
            mixture.experts(parts, names, moe, hidden)
        else:
            common.gated_mlp(parts, hidden, mlp.intermediate_size)
        layers.append(LayerSpec(attention, moe if sparse else mlp, tuple(parts.params)))
    return common.model(config, layers, common.outer(config))
