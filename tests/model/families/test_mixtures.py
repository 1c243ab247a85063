"""Mixtures: what config.json may leave out, what it may say in two ways, and what is refused instead of misread."""

from __future__ import annotations

from typing import Any

import pytest
from tests.tiny_mixtures import CONFIGS, config_of

from tightfit.checkpoints.config import Config
from tightfit.errors import CheckpointError
from tightfit.model.families import model_spec
from tightfit.model.spec import LatentAttentionSpec, MlpSpec, MoeSpec


def moe_of(family: str, **changes: Any) -> MoeSpec:
    mlp = model_spec(config_of(family, **changes), ()).layers[-1].mlp
    assert isinstance(mlp, MoeSpec)
    return mlp


@pytest.mark.parametrize(
    ("family", "change", "key"),
    [
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v3", {"n_group": 3}, "n_group"),  # of 8 experts
        ("deepseek_v3", {"n_group": 8}, "n_group"),  # groups of one have no best two
        ("deepseek_v3", {"topk_group": 1}, "topk_group"),  # 2 experts, for 3 that a token wants
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit"),
        ("gpt_oss", {"rope_scaling": None}, "rope_parameters"),
        ("mixtral", {"num_experts_per_tok": 7}, "num_experts_per_tok"),  # of 6 experts
        ("mixtral", {"num_local_experts": None}, "num_local_experts"),
        ("qwen3_moe", {"num_experts": None}, "num_experts"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size"),
    ],
)
def test_what_is_not_known_or_missing_is_refused_by_its_name(family: str, change: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{key}'"):
        model_spec(config_of(family, **change), ())


@pytest.mark.parametrize(
    ("family", "hub", "other"),
    [
        ("qwen3_moe", "num_experts", "num_local_experts"),  # as transformers 5 writes it
        ("olmoe", "num_experts", "num_local_experts"),
        ("mixtral", "num_local_experts", "num_experts"),
    ],
)
def test_the_number_of_experts_has_two_names(family: str, hub: str, other: str) -> None:
    assert moe_of(family, **{hub: None, other: 5}).experts == 5


def test_experts_of_layers_that_are_not_mixtures_are_left_out() -> None:
    config = config_of("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    mixtures = [isinstance(layer.mlp, MoeSpec) for layer in model_spec(config, ()).layers]
    assert mixtures == [False, True, False, False, False, True]
    dense = model_spec(config_of("deepseek_v3", num_hidden_layers=3, first_k_dense_replace=2), ())
    assert [isinstance(layer.mlp, MlpSpec) for layer in dense.layers] == [True, True, False]


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("mixtral", {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.gate_up_proj"}),
        ("qwen2_moe", {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.gate_up_proj"}),
        ("deepseek_v3", {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.down_proj"}),
        ("gpt_oss", {"model.layers.1.mlp.experts.gate_up_proj_blocks", "model.layers.1.mlp.experts.down_proj_blocks"}),
    ],
)
def test_the_names_in_the_checkpoint_decide_where_experts_stand(family: str, keys: set[str]) -> None:
    fused = "model.layers.1.mlp.experts.gate_up_proj"
    names = {fused, f"{fused}_blocks"} if family == "gpt_oss" else {fused}
    sources = {param.source.key for param in model_spec(config_of(family), names).layers[1].params}
    assert keys <= sources
    assert not keys <= {param.source.key for param in model_spec(config_of(family), ()).layers[1].params}


def test_a_latent_of_queries_is_there_unless_the_config_says_null() -> None:
    def rank(values: dict[str, Any]) -> int | None:
        attention = model_spec(Config({"model_type": "deepseek_v3"} | values, "x"), ()).layers[0].attention
        assert isinstance(attention, LatentAttentionSpec)
        return attention.q_lora_rank

    values = dict(CONFIGS["deepseek_v3"])
    assert rank(values | {"q_lora_rank": None}) is None
    assert rank(values | {"q_lora_rank": 12}) == 12
    del values["q_lora_rank"]
    assert rank(values) == 1536  # what DeepSeek's configuration class implies
