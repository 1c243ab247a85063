"""Gemma 2 (https://arxiv.org/abs/2408.00118): local and global layers in turn, norms around each part that multiply by
``1 + weight``, scores and logits limited by a soft cap, embeddings scaled by the root of the hidden size."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.rope import rope_parameters
from tightfit.model.families import common
from tightfit.model.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, Parts


def spec(config: Config, names: Collection[str]) -> ModelSpec:
    hidden, dim = config.integer("hidden_size"), config.integer("head_dim", 256)
    attention = AttentionSpec(
        heads=config.integer("num_attention_heads"),
        kv_heads=common.kv_heads(config),
        head_dim=dim,
        scale=config.number("query_pre_attn_scalar", 256.0, above=0.0) ** -0.5,
        rope=common.rope(rope_parameters(config)["full_attention"], dim),
        softcap=config.optional_number("attn_logit_softcapping", 50.0, above=0.0),
    )
    mlp = MlpSpec(
        config.integer("intermediate_size"), common.activation(config, "hidden_activation", "gelu_pytorch_tanh")
    )
    window = config.optional_integer("sliding_window", 4096)
    bias = config.flag("attention_bias", False)
    layers = []
    for index, kind in enumerate(common.layer_types(config, lambda index: index % 2 == 0)):
        parts = Parts(f"model.layers.{index}.")
        common.sandwich_norms(parts, hidden, add=common.one_more(config))
        common.qkvo(parts, attention, hidden, qkv_bias=bias, o_bias=bias)
        common.gated_mlp(parts, hidden, mlp.intermediate_size)
        local = replace(attention, window=window if kind == "sliding_attention" else None)
        layers.append(LayerSpec(local, mlp, tuple(parts.params)))
    return common.model(
        config,
        layers,
        common.outer(config, tied=True, norm_add=common.one_more(config)),
        embedding_multiplier=math.sqrt(hidden),
        logit_softcap=config.optional_number("final_logit_softcapping", 30.0, above=0.0),
    )
