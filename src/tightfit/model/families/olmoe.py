"""OLMoE (https://arxiv.org/abs/2409.02060): norms over all queries and all keys, and 64 experts in every layer."""

from __future__ import annotations

from collections.abc import Collection

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.rope import rope_parameters
from tightfit.model.families import common, mixture
from tightfit.model.spec import AttentionSpec, LayerSpec, ModelSpec, MoeSpec, Parts


def spec(config: Config, names: Collection[str]) -> ModelSpec:
    hidden, dim = config.integer("hidden_size"), common.head_dim(config)
    attention = AttentionSpec(
        heads=config.integer("num_attention_heads"),
        kv_heads=common.kv_heads(config),
        head_dim=dim,
        scale=dim**-0.5,
        rope=common.rope(rope_parameters(config)["full_attention"], dim),
        qk_norm="all",
        clip_qkv=config.optional_number("clip_qkv", above=0.0),
    )
    count = mixture.expert_count(config, "num_experts", "num_local_experts")
    moe = MoeSpec(
        experts=count,
        experts_per_token=mixture.experts_per_token(config, count),
        intermediate_size=config.integer("intermediate_size"),
        activation=common.activation(config, default="silu"),
        normalize=config.flag("norm_topk_prob", False),
    )
    bias = config.flag("attention_bias", False)
    layers = []
    for index in range(config.integer("num_hidden_layers")):
        parts = Parts(f"model.layers.{index}.")
        common.pre_norms(parts, hidden)
        common.qkvo(parts, attention, hidden, qkv_bias=bias, o_bias=bias)
        parts.vector("q_norm", "self_attn.q_norm.weight", attention.heads * dim)
        parts.vector("k_norm", "self_attn.k_norm.weight", attention.kv_heads * dim)
        mixture.router(parts, "mlp.gate", count, hidden)
        mixture.experts(parts, names, moe, hidden)
        layers.append(LayerSpec(attention, moe, tuple(parts.params)))
    return common.model(config, layers, common.outer(config), eps=1e-5)
