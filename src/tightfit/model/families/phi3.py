"""Phi 3 and 4 (https://arxiv.org/abs/2404.14219): llama with fused projections, of whose head features only a share may
be rotated, and with longrope in the checkpoints for long contexts."""

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
        window=config.optional_integer("sliding_window"),
    )
    mlp = MlpSpec(config.integer("intermediate_size"), common.activation(config, default="silu"))
    width, kv_width = attention.heads * dim, attention.kv_heads * dim
    layers = []
    for index in range(config.integer("num_hidden_layers")):
        parts = Parts(f"model.layers.{index}.")
        common.pre_norms(parts, hidden)
        parts.matrix("q_proj", "self_attn.qkv_proj", width, hidden)
        parts.matrix("k_proj", "self_attn.qkv_proj", kv_width, hidden, start=width)
        parts.matrix("v_proj", "self_attn.qkv_proj", kv_width, hidden, start=width + kv_width)
        parts.matrix("o_proj", "self_attn.o_proj", hidden, width)
        parts.matrix("gate_proj", "mlp.gate_up_proj", mlp.intermediate_size, hidden)
        parts.matrix("up_proj", "mlp.gate_up_proj", mlp.intermediate_size, hidden, start=mlp.intermediate_size)
        parts.matrix("down_proj", "mlp.down_proj", hidden, mlp.intermediate_size)
        layers.append(LayerSpec(attention, mlp, tuple(parts.params)))
    return common.model(config, layers, common.outer(config), eps=1e-5)
