"""From a GGUF file's metadata and tensors to the config.json and the names of tensors that the families know.

Three things differ from Hugging Face's checkpoints beside names:

- In llama files the rows of queries and keys are in an order in which neighbours are rotated together instead of the
  halves of a head: ``rope_interleave``, a key that deepseek's config.json has too.
- Gemma's norms are stored with the 1 that they are used with: ``norm_weights_add_one`` is false.
- The frequencies of llama 3's rope are divided by factors that stand in a tensor. longrope says just that.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tightfit.checkpoints.gguf.tokenizer import token_ids
from tightfit.errors import CheckpointError

Metadata = Callable[[str], Any]  # the value under a key, or None
Shapes = Mapping[str, tuple[int, ...]]

ROPE_FACTORS = "rope_freqs.weight"
BLOCK = re.compile(r"blk\.(\d{1,9})\.(.+)")
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    **{
        f"attn_{part}.{kind}": f"self_attn.{part[0]}_proj.{kind}"
        for part in ("q", "k", "v", "output")
        for kind in ("weight", "bias")
    },
}
HEAD_NORMS = {f"attn_{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in ("q", "k")}
MLP = {
    f"ffn_{part}.{kind}": f"mlp.{part}_proj.{kind}" for part in ("gate", "up", "down") for kind in ("weight", "bias")
}
PRE_NORM = {"ffn_norm.weight": "post_attention_layernorm.weight"}
SANDWICH_NORMS = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
EXPERTS = {f"ffn_{part}_exps.weight": f"mlp.experts.{part}_proj" for part in ("gate", "up", "down")}
ROUTER = {"ffn_gate_inp.weight": "mlp.gate.weight"}
GPT_OSS = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "attn_sinks.weight": "self_attn.sinks",
    "ffn_gate_inp.weight": "mlp.router.weight",
    "ffn_gate_inp.bias": "mlp.router.bias",
    **{f"ffn_{part}_exps.bias": f"mlp.experts.{part}_proj_bias" for part in ("gate", "up", "down")},
}
SHARED_EXPERT = {
    **{f"ffn_{part}_shexp.weight": f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")},
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
}


@dataclass(frozen=True)
class Architecture:
    """``block`` maps the names of a layer's tensors, ``settings`` are keys of config.json that all such files have,
    ``gating`` is llama.cpp's number of how experts are scored (1: softmax over all, 3: over those that are chosen)."""

    model_type: str
    block: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    gating: int = 1


PLAIN = ATTENTION | PRE_NORM | MLP
MIXTRAL = EXPERTS | {"ffn_gate_inp.weight": "block_sparse_moe.gate.weight"}
GEMMA = {"norm_weights_add_one": False}
ARCHITECTURES = {
    "llama": Architecture("llama", PLAIN | MIXTRAL, {"rope_interleave": True}),
    "qwen2": Architecture("qwen2", PLAIN),
    "qwen2moe": Architecture("qwen2_moe", PLAIN | ROUTER | EXPERTS | SHARED_EXPERT, {"norm_topk_prob": False}),
    "qwen3": Architecture("qwen3", PLAIN | HEAD_NORMS),
    "qwen3moe": Architecture("qwen3_moe", PLAIN | HEAD_NORMS | ROUTER | EXPERTS, {"norm_topk_prob": True}),
    "gemma2": Architecture("gemma2", ATTENTION | SANDWICH_NORMS | MLP, GEMMA),
    "gemma3": Architecture("gemma3_text", ATTENTION | HEAD_NORMS | SANDWICH_NORMS | MLP, GEMMA),
    "gpt-oss": Architecture("gpt_oss", ATTENTION | EXPERTS | GPT_OSS, gating=3),
}
# Settings of other architectures: here each must be absent or as good as absent.
NEUTRAL = {
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.causal": (True,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "expert_weights_scale": (0.0, 1.0),
}
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose queries are scaled otherwise


def architecture_of(name: Any, file: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{file} is of the architecture '{name}', which does not open from GGUF",
            f"Known are: {', '.join(ARCHITECTURES)}. Other families open from safetensors.",
        )
    return ARCHITECTURES[name]


def renamed(architecture: str, name: str, shape: tuple[int, ...], file: str) -> tuple[str, tuple[int, ...]]:
    """Name and shape of a tensor in Hugging Face's checkpoints. Raises CheckpointError for one that the architecture
    does not have."""
    match = BLOCK.fullmatch(name)
    found = architecture_of(architecture, file).block.get(match[2]) if match else OUTER.get(name)
    if found is None:
        raise CheckpointError(
            f"{file} has tensor '{name}', which the architecture '{architecture}' has no use for",
            "The file was written by another program, or for another one: take another version of the model.",
        )
    if name.endswith("_inp_shexp.weight"):
        shape = (1, shape[-1])
    return (f"model.layers.{match[1]}.{found}" if match else found), shape


def config_of(metadata: Metadata, shapes: Shapes, rope_factors: list[float] | None, file: str) -> dict[str, Any]:
    """config.json of the model in ``file`` with tensors of ``shapes``. Raises CheckpointError where something is
    missing, or asks for what is not known."""
    name = metadata("general.architecture")
    architecture = architecture_of(name, file)

    def get(key: str, default: Any = None) -> Any:
        value = metadata(f"{name}.{key}")
        return default if value is None else value

    def need(key: str) -> Any:
        value = get(key)
        if value is None:
            raise CheckpointError(f"{file} has no '{name}.{key}'", "The file is incomplete: download it again.")
        return value

    for key, neutral in (NEUTRAL | {"expert_gating_func": (0, architecture.gating)}).items():
        if get(key, neutral[0]) not in neutral:
            raise CheckpointError(
                f"{file} has '{name}.{key}' = {get(key)}, which is not known for this architecture",
                "Take the model's safetensors.",
            )
    layers, hidden, heads = need("block_count"), need("embedding_length"), _of_all(need("attention.head_count"))
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{file} has no tensor 'token_embd.weight'", "The file is incomplete: download it again.")
    dim = get("attention.key_length") or hidden // max(heads or 1, 1)
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": _of_all(need("feed_forward_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": _of_all(get("attention.head_count_kv", heads)),
        "head_dim": dim,
        "rms_norm_eps": _decimal(need("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": need("context_length"),
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        **architecture.settings,
        **_rope(get, dim, rope_factors),
        **token_ids(metadata),
    }
    if get("attention.value_length", dim) != dim or None in config.values():
        raise CheckpointError(
            f"the layers or heads of {file} differ in size, which is not supported",
            "Take another version of the model.",
        )
    config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    config["mlp_bias"] = "blk.0.ffn_down.bias" in shapes
    experts = shapes.get("blk.0.ffn_gate_exps.weight")
    if experts is not None:
        config |= {"num_local_experts": experts[0], "num_experts": experts[0]}
        config |= {"num_experts_per_tok": need("expert_used_count"), "moe_intermediate_size": experts[1]}
        if name == "llama":
            config["model_type"] = "mixtral"
        if name in ("llama", "gpt-oss"):
            config["intermediate_size"] = experts[1]
    shared = shapes.get("blk.0.ffn_gate_shexp.weight")
    if shared is not None:
        config["shared_expert_intermediate_size"] = shared[0]
    if name == "gpt-oss":
        config["sliding_window"] = get("attention.sliding_window", 128)
        config.get("rope_scaling", {})["truncate"] = False
    if name in LARGEST_GEMMA:
        config |= _gemma(get) | {"query_pre_attn_scalar": hidden / heads if layers == LARGEST_GEMMA[name] else dim}
    return config


def _of_all(value: Any) -> Any:
    """A number that may be given for each layer, if it is the same for all; else None."""
    if not isinstance(value, list):
        return value
    return value[0] if len(set(value)) == 1 else None


def _decimal(value: float) -> float:
    """The shortest number that is the same in float32, such as 1e-05."""
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next(number for number in candidates if struct.pack("f", number) == struct.pack("f", value))


def _rope(get: Callable[..., Any], dim: int, factors: list[float] | None) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": _decimal(get("rope.freq_base", 10000.0))}
    if (rotated := get("rope.dimension_count", dim)) != dim:
        rope["partial_rotary_factor"] = rotated / dim
    kind = get("rope.scaling.type", "none")
    factor = get("rope.scaling.factor") or get("rope.scale_linear") or 1.0
    if factors is not None:
        scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    elif kind == "yarn":
        scaling = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": get("rope.scaling.original_context_length"),
            "beta_fast": get("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": get("rope.scaling.yarn_beta_slow", 1.0),
            "attention_factor": get("rope.scaling.attn_factor", 1.0) * (0.1 * math.log(max(factor, 1.0)) + 1),
        }
    elif kind in ("none", "linear"):
        scaling = {"rope_type": "linear", "factor": factor} if factor != 1 else {}
    else:
        scaling = {"rope_type": kind}  # an error where it is read
    return rope | ({"rope_scaling": scaling} if scaling else {})


def _gemma(get: Callable[..., Any]) -> dict[str, Any]:
    """What is not there has its default."""
    config = {
        "attn_logit_softcapping": get("attn_logit_softcapping"),
        "final_logit_softcapping": get("final_logit_softcapping"),
        "sliding_window": get("attention.sliding_window"),
        "rope_local_base_freq": get("rope.freq_base_swa", 10000.0),
    }
    pattern = get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    elif pattern is not None:
        config["sliding_window_pattern"] = pattern
    return {key: value for key, value in config.items() if value is not None}
