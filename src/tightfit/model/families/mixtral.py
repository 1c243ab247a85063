"""Mixtral (https://arxiv.org/abs/2401.04088): mistral with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Collection

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.rope import rope_parameters
from tightfit.model.families import common, mixture
from tightfit.model.spec import AttentionSpec, LayerSpec, ModelSpec, MoeSpec, Parts

# gate, up and down of one expert
EACH = (
    "block_sparse_moe.experts.{expert}.w1.weight",
    "block_sparse_moe.experts.{expert}.w3.weight",
    "block_sparse_moe.experts.{expert}.w2.weight",
)


def spec(config: Config, names: Collection[str]) -> ModelSpec:
    hidden, dim = config.integer("hidden_size"), common.head_dim(config)
    attention = AttentionSpec(
        heads=config.integer("num_attention_heads"),
        kv_heads=common.kv_heads(config),
        head_dim=dim,
        scale=dim**-0.5,
        rope=common.rope(
            rope_parameters(config, default_theta=1e6)["full_attention"], dim, config.flag("rope_interleave", False)
        ),
        window=config.optional_integer("sliding_window"),
    )
    count = mixture.expert_count(config, "num_local_experts", "num_experts")
    moe = MoeSpec(
        experts=count,
        experts_per_token=mixture.experts_per_token(config, count),
        intermediate_size=config.integer("intermediate_size"),
        activation=common.activation(config, default="silu"),
        normalize=True,
    )
    layers = []
    for index in range(config.integer("num_hidden_layers")):
        parts = Parts(f"model.layers.{index}.")
        common.pre_norms(parts, hidden)
        common.qkvo(parts, attention, hidden)
        stacked = mixture.is_stacked(parts, names)
        mixture.router(parts, "mlp.gate" if stacked else "block_sparse_moe.gate", count, hidden)
        mixture.experts(parts, names, moe, hidden, EACH)
        layers.append(LayerSpec(attention, moe, tuple(parts.params)))
    return common.model(config, layers, common.outer(config), eps=1e-5)
