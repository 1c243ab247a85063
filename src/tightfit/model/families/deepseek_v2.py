"""DeepSeek-V2 (https://arxiv.org/abs/2405.04434): latent attention, and routed experts beside shared ones."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.rope import rope_parameters
from tightfit.model.families import common, mixture
from tightfit.model.spec import LatentAttentionSpec, LayerSpec, MlpSpec, ModelSpec, MoeSpec, Parts

NORM_EPS = 1e-6  # of the norms inside of attention, whatever rms_norm_eps is


def latent_attention(config: Config, interleaved: bool) -> LatentAttentionSpec:
    """The attention of every layer. Its scale contains YaRN's temperature, squared, where ``mscale_all_dim`` is set."""
    heads = config.integer("num_attention_heads")
    mixture.only(config, "num_key_value_heads", heads)  # every head has its own keys, made from the one latent
    nope, rotated = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    parameters = rope_parameters(config)["full_attention"]
    scale = (nope + rotated) ** -0.5
    if parameters.mscale_all_dim and parameters.factor > 1.0:
        scale *= (0.1 * parameters.mscale_all_dim * math.log(parameters.factor) + 1.0) ** 2
    return LatentAttentionSpec(
        heads=heads,
        q_lora_rank=config.optional_integer("q_lora_rank", 1536),
        kv_lora_rank=config.integer("kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rotated,
        v_head_dim=config.integer("v_head_dim"),
        scale=scale,
        rope=common.rope(parameters, rotated, interleaved),
        norm_eps=NORM_EPS,
    )


def latent_projections(parts: Parts, spec: LatentAttentionSpec, hidden: int, *, bias: bool) -> None:
    """Queries straight from the hidden states or through a latent of their own, the latent of keys and values, and the
    output."""
    width = spec.heads * (spec.qk_nope_head_dim + spec.qk_rope_head_dim)
    if spec.q_lora_rank is None:
        parts.matrix("q_proj", "self_attn.q_proj", width, hidden)
    else:
        parts.matrix("q_a_proj", "self_attn.q_a_proj", spec.q_lora_rank, hidden, bias=bias)
        parts.vector("q_a_layernorm", "self_attn.q_a_layernorm.weight", spec.q_lora_rank)
        parts.matrix("q_b_proj", "self_attn.q_b_proj", width, spec.q_lora_rank)
    parts.matrix("kv_a_proj_with_mqa", "self_attn.kv_a_proj_with_mqa", spec.key_dim, hidden, bias=bias)
    parts.vector("kv_a_layernorm", "self_attn.kv_a_layernorm.weight", spec.kv_lora_rank)
    up = spec.heads * (spec.qk_nope_head_dim + spec.v_head_dim)
    parts.matrix("kv_b_proj", "self_attn.kv_b_proj", up, spec.kv_lora_rank)
    parts.matrix("o_proj", "self_attn.o_proj", hidden, spec.heads * spec.v_head_dim, bias=bias)


def groups(config: Config, spec: MoeSpec, smallest: int = 1) -> MoeSpec:
    """``spec`` with its experts in ``n_group`` groups of at least ``smallest``, of which ``topk_group`` are chosen."""
    count = config.integer("n_group", maximum=spec.experts // smallest)
    if spec.experts % count:
        raise config.wrong("n_group", f"a divisor of the {spec.experts} experts")
    chosen = config.integer("topk_group", maximum=count)
    if chosen * (spec.experts // count) < spec.experts_per_token:
        raise config.wrong("topk_group", f"groups that hold the {spec.experts_per_token} experts of a token")
    return replace(spec, n_group=count, topk_group=chosen)


def decoder(
    config: Config,
    names: Collection[str],
    attention: LatentAttentionSpec,
    moe: MoeSpec,
    *,
    mlp_bias: bool = False,
    correction: bool = False,
) -> ModelSpec:
    """Dense layers, then mixtures; with ``correction`` a learned bias takes part in the choice of experts."""
    mixture.only(config, "moe_layer_freq", 1)
    hidden = config.integer("hidden_size")
    mlp = MlpSpec(config.integer("intermediate_size"), moe.activation)
    bias = config.flag("attention_bias", False)
    dense = config.integer("first_k_dense_replace", minimum=0)
    layers = []
    for index in range(config.integer("num_hidden_layers")):
        parts = Parts(f"model.layers.{index}.")
        common.pre_norms(parts, hidden)
        latent_projections(parts, attention, hidden, bias=bias)
        if index < dense:
            common.gated_mlp(parts, hidden, mlp.intermediate_size, bias=mlp_bias)
        else:
            mixture.router(parts, "mlp.gate", moe.experts, hidden)
            mixture.experts(parts, names, moe, hidden)
            mixture.shared_expert(parts, "mlp.shared_experts", hidden, moe.shared_intermediate_size, bias=mlp_bias)
            if correction:
                parts.vector("router_correction", "mlp.gate.e_score_correction_bias", moe.experts)
        layers.append(LayerSpec(attention, mlp if index < dense else moe, tuple(parts.params)))
    return common.model(config, layers, common.outer(config))


def spec(config: Config, names: Collection[str]) -> ModelSpec:
    mixture.only(config, "scoring_func", "softmax")
    mixture.only(config, "norm_topk_prob", False)  # DeepSeek's code and transformers disagree on what it does
    count = mixture.expert_count(config, "n_routed_experts", "num_experts")
    width = config.integer("moe_intermediate_size")
    moe = MoeSpec(
        experts=count,
        experts_per_token=mixture.experts_per_token(config, count),
        intermediate_size=width,
        activation=common.activation(config, default="silu"),
        scaling=config.number("routed_scaling_factor", 1.0),
        shared_intermediate_size=width * config.integer("n_shared_experts"),
    )
    method = config.string("topk_method", "greedy")
    if method == "group_limited_greedy":
        moe = groups(config, moe)
    elif method != "greedy":
        raise config.wrong("topk_method", "greedy or group_limited_greedy")
    attention = latent_attention(config, interleaved=True)
    return decoder(config, names, attention, moe, mlp_bias=config.flag("mlp_bias", False))
