"""DeepSeek-V3 and R1 (https://arxiv.org/abs/2412.19437): V2 with sigmoid scores, whose ranking a learned bias corrects,
and groups of experts that are scored by their best two."""

from __future__ import annotations

from collections.abc import Collection

from tightfit.checkpoints.config import Config
from tightfit.model.families import common, mixture
from tightfit.model.families.deepseek_v2 import decoder, groups, latent_attention
from tightfit.model.spec import ModelSpec, MoeSpec


def spec(config: Config, names: Collection[str]) -> ModelSpec:
    mixture.only(config, "scoring_func", "sigmoid")
    mixture.only(config, "topk_method", "noaux_tc")
    count = mixture.expert_count(config, "n_routed_experts", "num_local_experts")
    width = config.integer("moe_intermediate_size")
    moe = MoeSpec(
        experts=count,
        experts_per_token=mixture.experts_per_token(config, count),
        intermediate_size=width,
        activation=common.activation(config, default="silu"),
        scoring="sigmoid",
        group_score="top2",
        normalize=config.flag("norm_topk_prob", True),
        scaling=config.number("routed_scaling_factor", 2.5),
        shared_intermediate_size=width * config.integer("n_shared_experts"),
    )
    attention = latent_attention(config, interleaved=config.flag("rope_interleave", True))
    return decoder(config, names, attention, groups(config, moe, smallest=2), correction=True)
