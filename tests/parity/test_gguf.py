"""Parity of models in GGUF with transformers, whose weights are what gguf's own dequantisation gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests import gguf_files
from tests.parity.harness import (
    TOLERANCE,
    Ours,
    check_all_paths,
    check_edits,
    difference,
    edit_layers,
    edit_param,
    edit_rope,
    make,
    theirs,
    tokens_of,
)
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tightfit.checkpoints.checkpoint import open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.model.families import model_spec
from tightfit.model.spec import AttentionSpec
from tightfit.plan.schema import OWN
from tightfit.weights.placement.ggml import CONVERTED
from tightfit.weights.placement.places import group_of

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 0.05,
    "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0},
}
EXPERTS = SIZES | {"num_experts_per_tok": 2, "num_experts": 5, "moe_intermediate_size": 32}
PATTERN = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {"rope_type": "yarn", "rope_theta": 3000.0, "factor": 4.0, "original_max_position_embeddings": 32}
WINDOW = {".attention.sliding_window": 20}
CAPS = {".attn_logit_softcapping": 20.0, ".final_logit_softcapping": 5.0}
# Configurations, and what of them stands in keys of the metadata beside those that all have.
MODELS: dict[str, tuple[PreTrainedConfig, dict[str, Any]]] = {
    "llama": (LlamaConfig(**SIZES), {}),
    "llama with biases": (LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), {}),
    "llama tied": (LlamaConfig(**SIZES, tie_word_embeddings=True), {}),
    "llama 3": (LlamaConfig(**SIZES | {"rope_parameters": LLAMA3}), {}),
    "llama linear": (
        LlamaConfig(**SIZES | {"rope_parameters": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 3.0}}),
        {".rope.scaling.type": "linear", ".rope.scaling.factor": 3.0},
    ),
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2), {}),
    "qwen2": (Qwen2Config(**SIZES), {}),
    "qwen2 yarn": (
        Qwen2Config(**SIZES | {"rope_parameters": YARN}),
        {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0, ".rope.scaling.original_context_length": 32},
    ),
    "qwen2moe": (Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=64, norm_topk_prob=False), {}),
    "qwen3": (Qwen3Config(**SIZES), {}),
    "qwen3moe": (Qwen3MoeConfig(**EXPERTS, norm_topk_prob=True), {}),
    "gemma2": (
        Gemma2Config(
            **SIZES,
            query_pre_attn_scalar=32,
            sliding_window=20,
            attn_logit_softcapping=20.0,
            final_logit_softcapping=5.0,
        ),
        WINDOW | CAPS,
    ),
    "gemma3": (
        Gemma3TextConfig(
            **SIZES
            | {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                }
            },
            query_pre_attn_scalar=32,
            sliding_window=20,
            layer_types=PATTERN,
        ),
        WINDOW | {".attention.sliding_window_pattern": 2, ".rope.scaling.type": "linear", ".rope.scaling.factor": 8.0},
    ),
}
OSS = YARN | {"truncate": False, "beta_fast": 1.5, "beta_slow": 0.3}
MODELS["gpt-oss"] = (
    GptOssConfig(
        **SIZES | {"rope_parameters": OSS, "intermediate_size": 64},
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=20,
    ),
    MODELS["qwen2 yarn"][1]
    | WINDOW
    | {".rope.scaling.yarn_beta_fast": 1.5, ".rope.scaling.yarn_beta_slow": 0.3, ".expert_gating_func": 3},
)
DENSE = ("F32", "F16", "BF16")
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "MXFP4")


@pytest.mark.parametrize("name", MODELS)
def test_families(name: str, tmp_path: Path) -> None:
    config, metadata = MODELS[name]
    model = make(config)
    check_all_paths(model, gguf_files.write(tmp_path / "model.gguf", model, metadata=metadata))


def wide() -> LlamaConfig:
    """Rows of whole blocks of all types."""
    return LlamaConfig(
        **SIZES | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    )


@pytest.mark.parametrize("kind", [*DENSE, *QUANTISED])
def test_types(kind: str, tmp_path: Path) -> None:
    """Against the numbers that gguf's own dequantisation gives: exactly where tiles hold them, and decoded to float32;
    the scales of K types are rounded to 11 bits, the weights by half a thousandth."""
    model = make(wide())
    path = gguf_files.write(tmp_path / "model.gguf", model, kind)
    tokens = tokens_of(model, 40)
    reference = theirs(model, tokens, [40])
    assert reference.std() >= 1.0
    for weights, tolerance in ((OWN, 2e-3 if kind in CONVERTED else TOLERANCE), ("f32", TOLERANCE)):
        ours = Ours(path, context=40, chunk=40, weights=weights)
        assert difference(ours.sequence(tokens, [40]), reference) < tolerance


def test_types_may_be_mixed_in_a_layer(tmp_path: Path) -> None:
    """As in files of llama.cpp: queries and values are multiplied together and stored in different types."""
    kinds = {"attn_q": "Q4_0", "attn_k": "Q5_1", "attn_v": "Q8_0", "ffn_gate": "MXFP4", "ffn_up": "F16"}
    model = make(wide())
    path = gguf_files.write(tmp_path / "model.gguf", model, lambda name: kinds.get(name.split(".")[-2], "Q5_0"))
    check_all_paths(model, path)


@pytest.mark.parametrize(
    ("name", "kind", "own"),
    [
        ("mixtral", "Q5_1", "Int5(group=32, symmetric=False, scales='f16')"),
        ("qwen2moe", "Q8_0", "Int8(group=32, symmetric=True, scales='f16')"),
        ("gpt-oss", "MXFP4", "FP4(group=32)"),
    ],
)
def test_experts_keep_their_codes(name: str, kind: str, own: str, tmp_path: Path) -> None:
    config, metadata = MODELS[name]
    model = make(config)
    path = tmp_path / "model.gguf"
    gguf_files.write(path, model, lambda name: kind if "_exps" in name else "Q8_0", metadata)
    check_all_paths(model, path)
    with open_checkpoint(str(path)) as checkpoint:
        spec = model_spec(Config(checkpoint.config, name), checkpoint.tensors)
        group = group_of(checkpoint, spec, "layers.0", OWN)
    formats = {place.param.name: str(place.format) for place in group.places if place.format}
    assert {formats[f"experts.{part}_proj"] for part in ("gate", "up", "down")} == {own}
    assert formats["router"] == "F32()"


# Each, left out, must be missed: that the family's other tests do not see to.
EDITS = {
    "llama": edit_layers(lambda layer: replace(layer, attention=not_interleaved(layer.attention))),
    "gemma2": edit_param("input_layernorm", "norm", add=1.0),
    "llama 3": edit_rope(rope_type="default"),
}


def not_interleaved(attention: AttentionSpec) -> AttentionSpec:
    assert attention.rope is not None
    return replace(attention, rope=replace(attention.rope, interleaved=False))


@pytest.mark.parametrize("name", EDITS)
def test_what_differs_in_gguf_is_missed(name: str, tmp_path: Path) -> None:
    config, metadata = MODELS[name]
    model = make(config)
    check_edits(model, gguf_files.write(tmp_path / "model.gguf", model, metadata=metadata), {name: EDITS[name]})
