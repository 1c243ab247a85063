"""Parity of the dense families with transformers. Llama, with every kind of rope, is in test_llama.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.parity.harness import (
    TOLERANCE,
    Edit,
    Ours,
    check_all_paths,
    check_edits,
    difference,
    edit_attention,
    edit_layers,
    edit_mlp,
    edit_model,
    edit_param,
    edit_rope,
    make,
    save,
    theirs,
    tokens_of,
    without,
)
from transformers import (
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GraniteConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from tightfit.model.spec import LayerSpec, ModelSpec

# Odd sizes, three heads to each of two key-value heads, an eps that matters.
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 42,
    "intermediate_size": 75,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 0.05,
    "pad_token_id": None,
}
# Where head_dim must be hidden_size / heads, and even.
NO_HEAD_DIM = SIZES | {"hidden_size": 60}

PRE_NORMS = {name: without(name) for name in ("input_layernorm", "pre_feedforward_layernorm")}
POST_NORMS = {name: without(name) for name in ("post_attention_layernorm", "post_feedforward_layernorm")}
COMMON: dict[str, Edit] = {
    "rope": edit_attention(rope=None),
    "rope base": edit_rope(rope_theta=3000.0),
    "scale": edit_attention(scale=0.21),
    "activation": edit_mlp(activation="relu"),
    "eps": edit_model(rms_norm_eps=1e-6),
}
WINDOW: dict[str, Edit] = {"window": edit_attention(window=None), "window of one more": edit_attention(window=12)}


def biases(*names: str) -> dict[str, Edit]:
    return {f"{name}.bias": without(f"{name}.bias") for name in names}


def check_opens(model: PreTrainedModel, folder: Path) -> None:
    """Asserts parity of one prefill, for another form of the same files."""
    tokens = tokens_of(model, 70)
    ours = Ours(folder, context=70, chunk=70).sequence(tokens, [70])
    assert difference(ours, theirs(model, tokens, [70])) < TOLERANCE


def swap_layers(first: int, second: int) -> Edit:
    """Exchanges the kinds of attention of two layers."""

    def edit(spec: ModelSpec) -> ModelSpec:
        layers = list(spec.layers)
        one, other = layers[first], layers[second]
        layers[first] = replace(one, attention=other.attention)
        layers[second] = replace(other, attention=one.attention)
        return replace(spec, layers=tuple(layers))

    return edit


def test_mistral_sees_only_its_window(tmp_path: Path) -> None:
    model = make(MistralConfig(**SIZES, head_dim=10, sliding_window=11))
    save(model, tmp_path)
    check_all_paths(model, tmp_path)
    check_edits(model, tmp_path, COMMON | PRE_NORMS | WINDOW)


def test_mistral_without_a_window(tmp_path: Path) -> None:
    model = make(MistralConfig(**SIZES, sliding_window=None, head_dim=10))
    check_all_paths(model, save(model, tmp_path))


@pytest.mark.parametrize("layer_types", [None, ["sliding_attention", "full_attention", "sliding_attention"]])
def test_qwen2_has_windows_in_some_layers(tmp_path: Path, layer_types: list[str] | None) -> None:
    config = Qwen2Config(
        **NO_HEAD_DIM, use_sliding_window=True, sliding_window=11, max_window_layers=1, layer_types=layer_types
    )
    model = make(config)
    save(model, tmp_path)
    check_all_paths(model, tmp_path)
    edits = COMMON | PRE_NORMS | WINDOW | biases("q_proj", "k_proj", "v_proj")
    check_edits(model, tmp_path, edits | {"layers": swap_layers(0, 2 if layer_types is None else 1)})


def test_qwen2_without_layer_types_in_the_file(tmp_path: Path) -> None:
    model = make(Qwen2Config(**NO_HEAD_DIM, use_sliding_window=True, sliding_window=11, max_window_layers=1))
    save(model, tmp_path, layer_types=None, use_sliding_window=True, max_window_layers=1, sliding_window=11)
    check_opens(model, tmp_path)


def test_qwen2_slides_only_where_it_is_told_to(tmp_path: Path) -> None:
    """Checkpoints carry a window and a number of layers that they do not use."""
    model = make(Qwen2Config(**NO_HEAD_DIM, use_sliding_window=False, sliding_window=11, max_window_layers=1))
    save(model, tmp_path, layer_types=None, sliding_window=11)
    check_opens(model, tmp_path)


def test_qwen3_normalises_each_head(tmp_path: Path) -> None:
    model = make(Qwen3Config(**SIZES, head_dim=10, attention_bias=True))
    save(model, tmp_path)
    check_all_paths(model, tmp_path)
    norms = {"qk_norm": edit_attention(qk_norm="none")}
    check_edits(model, tmp_path, COMMON | PRE_NORMS | norms | biases("q_proj", "k_proj", "v_proj", "o_proj"))


def test_qwen3_has_windows_in_some_layers(tmp_path: Path) -> None:
    model = make(Qwen3Config(**SIZES, head_dim=10, use_sliding_window=True, sliding_window=11, max_window_layers=2))
    save(model, tmp_path)
    check_all_paths(model, tmp_path)
    check_edits(model, tmp_path, WINDOW)


def test_gemma2(tmp_path: Path) -> None:
    config = Gemma2Config(
        **SIZES,
        head_dim=10,
        query_pre_attn_scalar=13,
        sliding_window=11,
        attn_logit_softcapping=2.0,  # scores reach beyond it
        final_logit_softcapping=4.0,  # logits too
        attention_bias=True,
    )
    model = make(config)
    save(model, tmp_path)
    check_all_paths(model, tmp_path)
    edits = {
        "softcap": edit_attention(softcap=None),
        "logit softcap": edit_model(logit_softcap=None),
        "embedding multiplier": edit_model(embedding_multiplier=1.0),
        "1 + weight of the last norm": edit_param("norm", add=0.0),
        "layers": swap_layers(0, 1),
        **{f"1 + weight of {name}": edit_param(name, add=0.0) for name in (*PRE_NORMS, *POST_NORMS)},
    }
    edits |= COMMON | PRE_NORMS | POST_NORMS | WINDOW | biases("q_proj", "k_proj", "v_proj", "o_proj")
    check_edits(model, tmp_path, edits)


def gemma3(**settings: Any) -> Gemma3TextConfig:
    return Gemma3TextConfig(
        **SIZES
        | {
            "head_dim": 10,
            "query_pre_attn_scalar": 13,
            "sliding_window": 11,
            "sliding_window_pattern": 3,
            "num_hidden_layers": 4,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        }
        | settings
    )


def test_gemma3_has_local_and_global_layers(tmp_path: Path) -> None:
    model = make(gemma3(final_logit_softcapping=4.0))
    save(model, tmp_path)
    check_all_paths(model, tmp_path)
    edits = {
        "qk_norm": edit_attention(qk_norm="none"),
        "rope scaling": edit_rope(rope_type="default"),
        "rope scaling of local layers": edit_rope(rope_type="linear", factor=8.0),
        "logit softcap": edit_model(logit_softcap=None),
        "embedding multiplier": edit_model(embedding_multiplier=1.0),
        "layers": swap_layers(1, 2),
        **{f"1 + weight of {name}": edit_param(name, add=0.0) for name in (*PRE_NORMS, *POST_NORMS)},
        **{f"1 + weight of {name}": edit_param(name, add=0.0) for name in ("norm", "q_norm", "k_norm")},
    }
    check_edits(model, tmp_path, COMMON | PRE_NORMS | POST_NORMS | WINDOW | edits)


def test_gemma3_in_the_form_of_transformers_4(tmp_path: Path) -> None:
    model = make(gemma3())
    save(
        model,
        tmp_path,
        rope_parameters=None,
        layer_types=None,
        rope_theta=2000.0,
        rope_local_base_freq=100.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=3,
    )
    check_opens(model, tmp_path)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_gemma3_inside_its_multimodal_wrapper(tmp_path: Path, prefix: str) -> None:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=gemma3().to_dict(), vision_config=vision, mm_tokens_per_image=4)
    model = make(config, auto=AutoModelForImageTextToText)
    save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    saved = next(name for name in tensors if name.endswith("embed_tokens.weight")).removesuffix("embed_tokens.weight")
    renamed = {name.replace(saved, prefix): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    # Real wrappers leave out what the configuration's class implies.
    assert values["text_config"].pop("model_type") == "gemma3_text"
    path.write_text(json.dumps(values))
    check_all_paths(model, tmp_path)


def phi3(**settings: Any) -> Phi3Config:
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.6}
    return Phi3Config(**NO_HEAD_DIM | {"rope_parameters": rope} | settings)


LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 24,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.6,
        "short_factor": [1.0, 1.2, 1.9],
        "long_factor": [1.5, 3.0, 9.0],
        "original_max_position_embeddings": 24,
    },
}


def test_phi3_has_fused_projections_and_rotates_a_share_of_each_head(tmp_path: Path) -> None:
    model = make(phi3(sliding_window=11))
    save(model, tmp_path)
    check_all_paths(model, tmp_path)

    def rotate_all(layer: LayerSpec) -> LayerSpec:
        assert layer.attention.rope is not None
        return replace(layer, attention=replace(layer.attention, rope=replace(layer.attention.rope, dim=10)))

    check_edits(model, tmp_path, COMMON | PRE_NORMS | WINDOW | {"partial rotation": edit_layers(rotate_all)})


def test_phi3_with_longrope(tmp_path: Path) -> None:
    model = make(phi3(**LONGROPE))
    save(model, tmp_path)
    check_all_paths(model, tmp_path, ragged="alone")
    edits = {
        "longrope": edit_rope(rope_type="default"),
        "attention factor": edit_rope(attention_factor=1.0),
        "long factors": edit_rope(long_factor=(1.0, 1.2, 1.9)),
        "original length": edit_rope(original_max_position_embeddings=100),
    }
    check_edits(model, tmp_path, edits)


def test_phi3_short_factors_count_within_the_original_length(tmp_path: Path) -> None:
    model = make(phi3(**LONGROPE))
    save(model, tmp_path)
    check_all_paths(model, tmp_path, length=24, decoded=3)
    check_edits(model, tmp_path, {"short factors": edit_rope(short_factor=(1.5, 3.0, 9.0))}, length=24)


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_phi3_in_the_form_of_transformers_4(tmp_path: Path, kind: str) -> None:
    model = make(phi3(**LONGROPE))
    factors = {name: LONGROPE["rope_parameters"][name] for name in ("short_factor", "long_factor")}
    save(
        model,
        tmp_path,
        rope_parameters=None,
        rope_theta=500.0,
        partial_rotary_factor=0.6,
        rope_scaling={"type": kind, **factors},
    )
    check_opens(model, tmp_path)


def test_olmo2_normalises_after_each_part_and_over_all_heads(tmp_path: Path) -> None:
    model = make(Olmo2Config(**NO_HEAD_DIM, attention_bias=True))
    save(model, tmp_path)
    check_all_paths(model, tmp_path)
    norms = {"qk_norm": edit_attention(qk_norm="none")}
    edits = COMMON | POST_NORMS | norms | biases("q_proj", "k_proj", "v_proj", "o_proj")
    check_edits(model, tmp_path, edits)


def test_granite_multipliers(tmp_path: Path) -> None:
    config = GraniteConfig(
        **NO_HEAD_DIM,
        embedding_multiplier=3.0,
        attention_multiplier=0.11,
        residual_multiplier=0.4,
        logits_scaling=0.5,
        attention_bias=True,
        mlp_bias=True,
    )
    model = make(config)
    save(model, tmp_path)
    check_all_paths(model, tmp_path)

    def full_residual(layer: LayerSpec) -> LayerSpec:
        return replace(layer, residual_multiplier=1.0)

    edits = {
        "embedding multiplier": edit_model(embedding_multiplier=1.0),
        "residual multiplier": edit_layers(full_residual),
        "logit multiplier": edit_model(logit_multiplier=1.0),
        "attention multiplier": edit_attention(scale=10**-0.5),
    }
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    check_edits(model, tmp_path, COMMON | PRE_NORMS | edits | biases(*projections))


def test_smollm3_has_layers_without_rope(tmp_path: Path) -> None:
    config = SmolLM3Config(
        **NO_HEAD_DIM, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=11, attention_bias=True
    )
    model = make(config)
    save(model, tmp_path)
    check_all_paths(model, tmp_path)
    edits = COMMON | PRE_NORMS | WINDOW | biases("q_proj", "k_proj", "v_proj", "o_proj")
    check_edits(model, tmp_path, edits | {"layers": swap_layers(0, 1)})


def test_smollm3_without_the_lists_in_the_file(tmp_path: Path) -> None:
    model = make(SmolLM3Config(**NO_HEAD_DIM, no_rope_layer_interval=2))
    save(model, tmp_path, no_rope_layers=None, layer_types=None)
    check_opens(model, tmp_path)
    check_edits(model, tmp_path, {"layers": swap_layers(0, 1)})
