"""Parity of the mixtures of experts with transformers, in every form in which they are saved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.parity.harness import (
    MISSED,
    TOLERANCE,
    Ours,
    check_all_paths,
    check_edits,
    difference,
    edit_attention,
    edit_layers,
    edit_mlp,
    edit_model,
    edit_rope,
    make,
    save,
    theirs,
    tokens_of,
    without,
)
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tightfit.model.spec import LayerSpec

LENGTH = 70  # tokens of a test: above every window and original context length below

# Odd numbers of experts and odd widths, and a head_dim that is not hidden_size / heads where the family has one.
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 42,
    "intermediate_size": 29,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LATENT: dict[str, Any] = SIZES | {
    "num_key_value_heads": 6,
    "moe_intermediate_size": 17,
    "kv_lora_rank": 22,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "n_routed_experts": 12,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 0.05,  # large, since the norms inside of attention must not take it
    "attention_bias": True,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
    },
}
GPT_OSS: dict[str, Any] = SIZES | {"head_dim": 10, "num_local_experts": 5, "sliding_window": 11}

COMMON = {
    **{name: without(name) for name in ("input_layernorm", "pre_feedforward_layernorm")},
    "rope base": edit_rope(rope_theta=300.0),
    "attention scale": edit_attention(scale=0.2),
    "eps": edit_model(rms_norm_eps=0.1),
    "activation": edit_mlp(activation="relu"),
    "number of experts": edit_mlp(experts_per_token=2),
    "scale of the experts": edit_mlp(scaling=1.1),
}


def mixture(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model whose experts are computed one after the other, which is transformers' reference."""
    model = make(config, seed)
    model.set_experts_implementation("eager")
    return model


def mixtral() -> PreTrainedModel:
    return mixture(MixtralConfig(**SIZES, num_local_experts=5, head_dim=10, sliding_window=11))


def qwen2_moe() -> PreTrainedModel:
    sizes = SIZES | {"hidden_size": 48}  # the family has no head_dim of its own
    return mixture(
        Qwen2MoeConfig(
            **sizes,
            moe_intermediate_size=13,
            shared_expert_intermediate_size=19,
            num_experts=7,
            norm_topk_prob=True,
            mlp_only_layers=[1],
            use_sliding_window=True,
            sliding_window=11,
            max_window_layers=2,
        )
    )


def qwen3_moe() -> PreTrainedModel:
    return mixture(
        Qwen3MoeConfig(
            **SIZES,
            head_dim=10,
            moe_intermediate_size=13,
            num_experts=7,
            decoder_sparse_step=2,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=11,
        )
    )


def olmoe() -> PreTrainedModel:
    sizes = SIZES | {"hidden_size": 48}  # as in qwen2_moe
    return mixture(OlmoeConfig(**sizes, num_experts=7, clip_qkv=0.9))


def deepseek_v2() -> PreTrainedModel:
    return mixture(
        DeepseekV2Config(
            **LATENT,
            q_lora_rank=18,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.7,
            mlp_bias=True,
        )
    )


def deepseek_v3() -> PreTrainedModel:
    return mixture(DeepseekV3Config(**LATENT, q_lora_rank=18, n_group=4, topk_group=2), seed=1)


def test_mixtral_routes_every_layer_and_renormalises_the_chosen_experts(tmp_path: Path) -> None:
    model = mixtral()
    save(model, tmp_path)
    check_all_paths(model, tmp_path, length=LENGTH)
    check_edits(
        model,
        tmp_path,
        {
            **COMMON,
            "scores": edit_mlp(scoring="sigmoid"),
            "sum of the chosen to one": edit_mlp(normalize=False),
            "no window": edit_attention(window=None),
            "window of one more": edit_attention(window=12),
        },
        length=LENGTH,
    )


def test_qwen2_moe_adds_a_gated_shared_expert_and_has_dense_layers(tmp_path: Path) -> None:
    model = qwen2_moe()
    save(model, tmp_path)
    assert [hasattr(layer.mlp, "experts") for layer in Ours(tmp_path, context=LENGTH, chunk=LENGTH).spec.layers] == [
        True,
        False,
        True,
    ]
    check_all_paths(model, tmp_path, length=LENGTH)
    check_edits(
        model,
        tmp_path,
        {
            **COMMON,
            **{f"{name}.bias": without(f"{name}.bias") for name in ("q_proj", "v_proj")},
            "sum of the chosen to one": edit_mlp(normalize=False),
            "shared expert": edit_mlp(shared_intermediate_size=0),
            "scores": edit_mlp(scoring="sigmoid"),
            "gate of the shared expert": edit_mlp(shared_gate=False),
            "no window": edit_attention(window=None),
            "window in every layer": edit_attention(window=11),
        },
        length=LENGTH,
    )


def test_qwen3_moe_normalises_heads_and_mixes_in_every_other_layer(tmp_path: Path) -> None:
    model = qwen3_moe()
    save(model, tmp_path)
    check_all_paths(model, tmp_path, length=LENGTH)
    check_edits(
        model,
        tmp_path,
        {
            **COMMON,
            **{f"{name}.bias": without(f"{name}.bias") for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
            "scores": edit_mlp(scoring="sigmoid"),
            "norms of heads": edit_attention(qk_norm="none"),
            "sum of the chosen below one": edit_mlp(normalize=True),
            "no window": edit_attention(window=None),
        },
        length=LENGTH,
    )


def test_olmoe_normalises_all_heads_together_and_clips_afterwards(tmp_path: Path) -> None:
    model = olmoe()
    save(model, tmp_path)
    check_all_paths(model, tmp_path, length=LENGTH)
    check_edits(
        model,
        tmp_path,
        {
            **COMMON,
            "norms of queries and keys": edit_attention(qk_norm="none"),
            "scores": edit_mlp(scoring="sigmoid"),
            "clip": edit_attention(clip_qkv=None),
            "sum of the chosen below one": edit_mlp(normalize=True),
        },
        length=LENGTH,
    )


def other_pairs(layer: LayerSpec) -> LayerSpec:
    """Rotates halves instead of neighbours, or the other way round."""
    assert layer.attention.rope is not None
    rope = replace(layer.attention.rope, interleaved=not layer.attention.rope.interleaved)
    return replace(layer, attention=replace(layer.attention, rope=rope))


DEEPSEEK = {
    **COMMON,
    "biases": without("q_a_proj.bias"),
    "bias of the latent": without("kv_a_proj_with_mqa.bias"),
    "bias of the output": without("o_proj.bias"),
    "temperature in the scale": edit_attention(scale=16**-0.5),
    "eps of the inner norms": edit_attention(norm_eps=0.05),
    "shared experts": edit_mlp(shared_intermediate_size=0),
    "groups": edit_mlp(n_group=1),
    "kind of rope": edit_rope(rope_type="default"),
    "factor of cosines and sines": edit_rope(mscale=None),
    "pairs of neighbours": edit_layers(other_pairs),
}


def test_deepseek_v2_attends_through_latents_and_chooses_within_groups(tmp_path: Path) -> None:
    model = deepseek_v2()
    save(model, tmp_path)
    check_all_paths(model, tmp_path, length=LENGTH)
    edits = {
        **DEEPSEEK,
        "scores": edit_mlp(scoring="sigmoid"),
        "bias of the dense layer": without("down_proj.bias"),
        "bias of the shared experts": without("shared.down_proj.bias"),
        "no scale of the experts": edit_mlp(scaling=1.0),
        "worth of a group": edit_mlp(group_score="top2"),
    }
    check_edits(model, tmp_path, edits, length=LENGTH)


def test_deepseek_v2_lite_projects_queries_directly_and_chooses_among_all(tmp_path: Path) -> None:
    config = LATENT | {"attention_bias": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    model = mixture(DeepseekV2Config(**config, q_lora_rank=None, topk_method="greedy"))
    save(model, tmp_path)
    check_all_paths(model, tmp_path, length=LENGTH)
    check_edits(model, tmp_path, {"no groups": edit_mlp(n_group=4, topk_group=1)}, length=LENGTH)


def test_deepseek_v3_ranks_by_corrected_sigmoids_and_the_best_two_of_a_group(tmp_path: Path) -> None:
    model = deepseek_v3()
    save(model, tmp_path)
    check_all_paths(model, tmp_path, length=LENGTH)
    edits = {
        **DEEPSEEK,
        "scores": edit_mlp(scoring="softmax"),
        "correction": without("router_correction"),
        "sum of the chosen to one": edit_mlp(normalize=False),
        "no scale of the experts": edit_mlp(scaling=1.0),
        "worth of a group": edit_mlp(group_score="max"),
    }
    check_edits(model, tmp_path, edits, length=LENGTH)


def test_deepseek_v3_rotates_halves_where_the_config_says_so(tmp_path: Path) -> None:
    model = mixture(DeepseekV3Config(**LATENT, q_lora_rank=None, n_group=1, topk_group=1, rope_interleave=False))
    save(model, tmp_path)
    check_all_paths(model, tmp_path, length=LENGTH)
    check_edits(model, tmp_path, {"halves": edit_layers(other_pairs)}, length=LENGTH)


def gpt_oss(**sizes: Any) -> PreTrainedModel:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 100.0,  # small, so that truncation matters
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    }
    model = mixture(GptOssConfig(**(GPT_OSS | sizes), rope_parameters=rope))
    for layer in model.model.layers:
        layer.mlp.experts.gate_up_proj.data.mul_(4.0)  # so that gates and ups exceed their limit of 7
    return model


def test_gpt_oss_has_sinks_windows_in_every_other_layer_and_experts_with_biases(tmp_path: Path) -> None:
    model = gpt_oss()
    save(model, tmp_path)
    check_all_paths(model, tmp_path, length=LENGTH)
    biases = ("router", "q_proj", "k_proj", "v_proj", "o_proj")
    biases += ("experts.gate_proj", "experts.up_proj", "experts.down_proj")
    check_edits(
        model,
        tmp_path,
        {
            **COMMON,
            **{f"{name}.bias": without(f"{name}.bias") for name in biases},
            "scores": edit_mlp(scoring="softmax"),
            "sinks": without("sinks"),
            "no window": edit_attention(window=None),
            "window in every layer": edit_attention(window=11),
            "kind of rope": edit_rope(rope_type="default"),
            "no truncation": edit_rope(truncate=True),
            "factor of cosines and sines": edit_rope(attention_factor=1.0),
        },
        length=LENGTH,
    )


def test_gpt_oss_limits_gates_and_ups_before_they_are_multiplied(tmp_path: Path) -> None:
    model = gpt_oss()
    save(model, tmp_path)
    tokens = tokens_of(model, LENGTH)
    ours = Ours(tmp_path, context=LENGTH, chunk=LENGTH).sequence(tokens, [LENGTH])
    assert difference(ours, theirs(model, tokens, [LENGTH])) < TOLERANCE
    for layer in model.model.layers:
        layer.mlp.experts.limit = 1e9
    assert difference(ours, theirs(model, tokens, [LENGTH])) > MISSED


@pytest.mark.parametrize("family", [mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, gpt_oss])
def test_no_choice_of_experts_above_hangs_on_rounding(family: Any) -> None:
    """Else parity would be luck: two right computations may differ by 1e-6 and choose other experts."""
    model = family()
    generator = torch.Generator().manual_seed(3)

    def choose_again(router: torch.nn.Module, inputs: tuple[torch.Tensor], outputs: tuple[torch.Tensor, ...]) -> None:
        weight = router.weight.data.clone()
        for _ in range(4):
            noise = 1e-4 * torch.randn(weight.shape, generator=generator)
            router.weight.data = weight * (1 + noise)
            again = type(router).forward(router, *inputs)
            assert torch.equal(again[2].sort().values, outputs[2].sort().values)
        router.weight.data = weight

    routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
    assert routers
    for router in routers:
        router.register_forward_hook(choose_again)
    theirs(model, tokens_of(model, LENGTH), [LENGTH])


@pytest.mark.parametrize("family", [mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3])
def test_stacked_experts_give_the_same_bits_as_one_tensor_for_each(family: Any, tmp_path: Path) -> None:
    model = family()
    each, stacked = save(model, tmp_path / "each"), tmp_path / "stacked"
    model.save_pretrained(stacked, save_original_format=False)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in load_file(stacked / "model.safetensors"))
    tokens = tokens_of(model, LENGTH)
    first, second = (
        Ours(folder, context=LENGTH, chunk=LENGTH).sequence(tokens, [LENGTH]) for folder in (each, stacked)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", [mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, gpt_oss])
def test_the_config_of_transformers_4_means_the_same(family: Any, tmp_path: Path) -> None:
    model = family()
    new, old = save(model, tmp_path / "new"), save(model, tmp_path / "old")
    values = json.loads((old / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"], kind = rope.pop("rope_theta"), rope.pop("rope_type")
    values["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    values.pop("layer_types", None)
    if "num_local_experts" in values and values["model_type"] == "qwen3_moe":
        values["num_experts"] = values.pop("num_local_experts")
    if values["model_type"] == "deepseek_v3":
        values |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
        del values["rope_interleave"]
    (old / "config.json").write_text(json.dumps(values))
    first, second = (Ours(folder, context=LENGTH, chunk=LENGTH).spec for folder in (new, old))
    assert first == second


def test_gpt_oss_opens_in_mxfp4(tmp_path: Path) -> None:
    model = gpt_oss(hidden_size=64, intermediate_size=32)  # MXFP4 scales groups of 32
    save(model, tmp_path, quantization_config={"quant_method": "mxfp4"})
    tensors = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for index, layer in enumerate(model.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            key, weight = f"model.layers.{index}.mlp.experts.{name}", getattr(layer.mlp.experts, name)
            experts, cols, rows = weight.shape
            blocks = torch.randint(256, (experts, rows, cols // 32, 16), dtype=torch.uint8, generator=generator)
            # Numbers of a standard deviation of 3 times 2 ** -4 or 2 ** -3: about those of the random weights.
            scales = torch.randint(123, 125, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
            weight.data.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            del tensors[key]
            tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    check_all_paths(model, tmp_path, length=LENGTH)


def test_deepseek_v3_opens_in_block_scaled_fp8(tmp_path: Path) -> None:
    block = 16  # divides few of the sizes; the published checkpoints have blocks of 128
    plain, fp8 = save(deepseek_v3(), tmp_path / "plain"), tmp_path / "fp8"
    save(deepseek_v3(), fp8, quantization_config={"quant_method": "fp8", "weight_block_size": [block, block]})
    decoded = load_file(plain / "model.safetensors")
    stored = dict(decoded)
    generator = torch.Generator().manual_seed(2)
    for name, weight in decoded.items():
        if "_proj" not in name or weight.dim() < 2:
            continue
        scales = 0.005 + 0.01 * torch.rand(*(-(-size // block) for size in weight.shape), generator=generator)
        wide = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)[: weight.shape[0], : weight.shape[1]]
        stored[name], stored[f"{name}_scale_inv"] = (weight / wide).to(torch.float8_e4m3fn), scales
        decoded[name] = (stored[name].float() * wide).bfloat16().float()
    save_file(decoded, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, fp8 / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager", dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    check_all_paths(model, fp8, length=LENGTH)
