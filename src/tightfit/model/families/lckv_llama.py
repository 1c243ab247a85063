"""Llamas whose layers were trained to read the keys and values of others, as the public code of LCKV
(https://arxiv.org/abs/2405.10637) names them in ``layer_types``: ``0_20_20_..._20_21`` is LCKV with a warm-up layer at
both ends, and MixAttention (https://arxiv.org/abs/2409.15012) is ``0_1s_1s_3s_..._0_7s``, with a window at each ``s``.

Where a layer reads a later one (LCKV), the token itself is not there yet: a query sees the tokens before its own, the
first one none, and what attention gives is zero then. Prompts go through such layers ``forward_passes +
backward_passes`` times, from keys and values that are zero, or with ``use_sequential`` until nothing changes any more.
Here that is done chunk by chunk. The public code leaves a decoded token a key of zeros in place of the token before it;
that is neither what the paper says nor what its prompts and its training do, so it is not done here.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

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
        past=config.flag("force_nodiag", False),
    )
    mlp = MlpSpec(config.integer("intermediate_size"), common.activation(config, default="silu"))
    bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    owners, slides = _layer_types(config)
    window = config.integer("sliding_window", 4096, minimum=2)
    layers = []
    for index, (owner, slide) in enumerate(zip(owners, slides, strict=True)):
        parts = Parts(f"model.layers.{index}.")
        common.pre_norms(parts, hidden)
        own = owner == index
        common.qkvo(parts, attention, hidden, qkv_bias=bias, o_bias=bias, kv=own)
        common.gated_mlp(parts, hidden, mlp.intermediate_size, bias=mlp_bias)
        kind = replace(attention, window=window if slide else None, past=attention.past or owner > index)
        layers.append(LayerSpec(kind, mlp, tuple(parts.params), owner=None if own else owner))
    passes = config.integer("forward_passes", 7, minimum=0) + config.integer("backward_passes", 2)
    sequential = config.flag("use_sequential", False)
    return replace(common.model(config, layers, common.outer(config)), passes=None if sequential else passes)


def _layer_types(config: Config) -> tuple[list[int], list[bool]]:
    """Of each layer the one whose keys and values it reads, and whether it has a window."""
    count = config.integer("num_hidden_layers")
    text = config.string("layer_types", "_".join(map(str, range(count))))
    found = [re.fullmatch(r"(\d{1,4})(s?)", part) for part in text.split("_")]
    owners = [int(match[1]) for match in found if match]
    if len(owners) != count or len(found) != count or not all(owner < count for owner in owners):
        raise config.wrong("layer_types", f"{count} numbers of layers, each with an s or not, and _ between")
    slides = [bool(match[2]) for match in found if match]
    for layer, owner in enumerate(owners):
        if owners[owner] != owner or slides[owner] != slides[layer]:
            raise config.wrong("layer_types", f"layer {owner}, which {layer} reads, to read itself as {layer} does")
    return owners, slides
