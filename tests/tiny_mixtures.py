"""Writes small models of every mixture family, with random weights, without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tightfit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.model.families import model_spec
from tightfit.model.spec import ModelSpec

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 3,
}
LATENT: dict[str, Any] = SIZES | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 18,
    "q_lora_rank": None,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "routed_scaling_factor": 1.5,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": SIZES | {"num_local_experts": 6},
    "qwen2_moe": SIZES
    | {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, "qkv_bias": True},
    "qwen3_moe": SIZES | {"num_experts": 6, "moe_intermediate_size": 24, "head_dim": 12},
    "olmoe": SIZES | {"num_experts": 6},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT | {"n_group": 4, "topk_group": 2},
    "gpt_oss": SIZES
    | {"num_local_experts": 6, "head_dim": 12, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 1e4},
}


def config_of(family: str, **changes: Any) -> Config:
    return Config({"model_type": family} | CONFIGS[family] | changes, family)


def write(folder: Path, config: Config, dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, ModelSpec]:
    """A checkpoint with one random tensor for each that the family calls for (stacked ones span all their parts)."""
    spec = model_spec(config, ())
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {}
    for _, param in spec.all_params():
        source = param.source
        rows = source.start + (param.shape[0] - 1) * source.step + 1
        one = (rows, *param.shape[1:])
        for expert in range(1 if source.stacked else max(param.experts, 1)):
            shape = one[::-1] if source.transposed else one
            shape = (param.experts, *shape) if source.stacked else shape
            key = source.key.format(expert=expert)
            shapes[key] = max(shapes.get(key, shape), shape)
    tensors = {
        key: (torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 1.0)).to(dtype)
        for key, shape in shapes.items()
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.values))
    return open_checkpoint(str(folder)), spec
