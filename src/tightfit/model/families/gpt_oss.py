"""gpt-oss (https://arxiv.org/abs/2508.10925): attention sinks, windows in every other layer, and experts with biases,
a clamped gate and, in the published checkpoints, 4-bit weights."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.rope import rope_parameters
from tightfit.model.families import common, mixture
from tightfit.model.spec import AttentionSpec, LayerSpec, ModelSpec, MoeSpec, Parts, Source

THETA = 150_000.0


def experts(parts: Parts, names: Collection[str], spec: MoeSpec, hidden: int) -> None:
    """All experts of a layer, stacked, with the rows of gate and up in turn. Packed in MXFP4 a matrix has one row for
    each output, in other types one for each input. GGUF files keep gate and up apart, one row for each output."""
    if f"{parts.prefix}mlp.experts.gate_proj" in names:
        for name, rows, cols in (
            ("gate_proj", spec.intermediate_size, hidden),
            ("up_proj", spec.intermediate_size, hidden),
            ("down_proj", hidden, spec.intermediate_size),
        ):
            matrix, bias = (Source(f"mlp.experts.{name}{suffix}", stacked=True) for suffix in ("", "_bias"))
            parts.experts(f"experts.{name}", matrix, spec.experts, rows, cols)
            parts.experts(f"experts.{name}.bias", bias, spec.experts, rows)
        return
    fused, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    packed = f"{parts.prefix}{fused}_blocks" in names
    suffix = "_blocks" if packed else ""
    count, width = spec.experts, spec.intermediate_size
    for start, name in enumerate(("experts.gate_proj", "experts.up_proj")):
        matrix = Source(fused + suffix, start=start, step=2, transposed=not packed, stacked=True)
        parts.experts(name, matrix, count, width, hidden)
        parts.experts(f"{name}.bias", Source(f"{fused}_bias", start=start, step=2, stacked=True), count, width)
    parts.experts("experts.down_proj", Source(down + suffix, transposed=not packed, stacked=True), count, hidden, width)
    parts.experts("experts.down_proj.bias", Source(f"{down}_bias", stacked=True), count, hidden)


def spec(config: Config, names: Collection[str]) -> ModelSpec:
    mixture.only(config, "swiglu_limit", 7.0)
    mixture.only(config, "swiglu_alpha", 1.702)
    if not config.get("rope_scaling"):
        config.section("rope_parameters")  # without either the frequencies are not known
    hidden, dim = config.integer("hidden_size"), config.integer("head_dim", 64)
    attention = AttentionSpec(
        heads=config.integer("num_attention_heads"),
        kv_heads=common.kv_heads(config),
        head_dim=dim,
        scale=dim**-0.5,
        rope=common.rope(rope_parameters(config, default_theta=THETA)["full_attention"], dim),
    )
    count = mixture.expert_count(config, "num_local_experts", "num_experts")
    moe = MoeSpec(
        experts=count,
        experts_per_token=mixture.experts_per_token(config, count),
        intermediate_size=config.integer("intermediate_size"),
        activation="clamped_swiglu",
        scoring="topk_softmax",
    )
    window = config.optional_integer("sliding_window", 128)
    bias = config.flag("attention_bias", True)
    layers = []
    for index, kind in enumerate(common.layer_types(config, lambda index: index % 2 == 0)):
        parts = Parts(f"model.layers.{index}.")
        common.pre_norms(parts, hidden)
        common.qkvo(parts, attention, hidden, qkv_bias=bias, o_bias=bias)
        parts.vector("sinks", "self_attn.sinks", attention.heads)
        mixture.router(parts, "mlp.router", count, hidden, bias=True)
        experts(parts, names, moe, hidden)
        here = replace(attention, window=window if kind == "sliding_attention" else None)
        layers.append(LayerSpec(here, moe, tuple(parts.params)))
    return common.model(config, layers, common.outer(config), eps=1e-5)
