"""Rotary settings: the same from both forms of config.json, and the same as transformers reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoConfig

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.rope import RopeParameters, rope_parameters
from tightfit.errors import CheckpointError

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 4096}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
YARN = {"factor": 40, "beta_fast": 16, "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.7}
# the head has 8 dimensions, of which three quarters rotate: three pairs
LONGROPE = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 4.0, 9.0]}

# model_type, the keys of transformers 4, default_theta of the family
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "nothing": ("llama", {}, 10_000.0),
    "theta": ("llama", {"rope_theta": 500_000.0}, 10_000.0),
    "null scaling": ("qwen2", {"rope_theta": 1e6, "rope_scaling": None}, 10_000.0),
    "linear, old name": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, 10_000.0),
    "dynamic": ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 10_000.0),
    "llama3": ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 10_000.0),
    "both names": ("llama", {"rope_scaling": {"rope_type": "llama3", "type": "linear", **LLAMA3}}, 10_000.0),
    "yarn": (
        "deepseek_v3",
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 512, **YARN}},
        10_000.0,
    ),
    "yarn, no original length": ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 10_000.0),
    "yarn, not truncated": (
        "gpt_oss",
        {"rope_theta": 150_000, "rope_scaling": {"rope_type": "yarn", "truncate": False, "factor": 32.0}},
        150_000.0,
    ),
    "gpt_oss theta": ("gpt_oss", {"rope_scaling": {"rope_type": "yarn", "factor": 32.0}}, 150_000.0),
    "mixtral theta": ("mixtral", {}, 1_000_000.0),
    "smollm3 theta": ("smollm3", {}, 2_000_000.0),
    "longrope": (
        "phi3",
        {
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 512,
            "rope_scaling": {"type": "longrope", **LONGROPE},
        },
        10_000.0,
    ),
    "longrope, named yarn": (
        "phi3",
        {
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 512,
            "rope_scaling": {"type": "yarn", "factor": 8.0, **LONGROPE},
        },
        10_000.0,
    ),
}


def ours(values: dict[str, Any], **options: Any) -> dict[str, RopeParameters]:
    return rope_parameters(Config(values, "org/model"), **options)


def assert_same(mine: RopeParameters, theirs: dict[str, Any]) -> None:
    """Each key that transformers has, with the same value; lists there are tuples here."""
    for key, value in theirs.items():
        if key == "type":  # the old name stays beside the new one
            continue
        value = tuple(value) if isinstance(value, list) else value
        assert getattr(mine, key) == value, key


@pytest.mark.parametrize("case", CASES)
def test_both_forms_are_read_as_transformers_reads_them(case: str) -> None:
    model_type, keys, theta = CASES[case]
    values = {"model_type": model_type, **SIZES, **json.loads(json.dumps(keys))}
    theirs = AutoConfig.for_model(**json.loads(json.dumps(values)))
    mine = ours(values, default_theta=theta)["full_attention"]
    assert_same(mine, theirs.rope_parameters)
    # the file that transformers 5 writes for the same model
    written = json.loads(theirs.to_json_string())
    assert "rope_parameters" in written
    assert "rope_scaling" not in written
    assert ours(written, default_theta=1.0)["full_attention"] == mine


def test_the_first_name_of_longrope_is_understood() -> None:
    new = CASES["longrope"][1]
    old = {**new, "rope_scaling": {"type": "su", **LONGROPE}}
    assert ours({**SIZES, **old}) == ours({**SIZES, **new})


def test_an_implied_factor_is_the_ratio_of_the_lengths() -> None:
    case = CASES["longrope"][1]
    assert ours({**SIZES, **case})["full_attention"].factor == 4096 / 512


def test_gemma3_has_a_base_for_each_layer_type_in_both_forms() -> None:
    values = {
        "model_type": "gemma3_text",
        **SIZES,
        "rope_theta": 2e6,
        "rope_local_base_freq": 5e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    options = {
        "layer_types": ("full_attention", "sliding_attention"),
        "default_theta": 1e6,
        "local_theta": 1e4,
    }
    for keys in (values, {key: value for key, value in values.items() if "rope" not in key}):
        theirs = AutoConfig.for_model(**json.loads(json.dumps(keys)))
        written = json.loads(theirs.to_json_string())
        assert isinstance(written["rope_parameters"]["sliding_attention"], dict)
        for form in (keys, written):
            mine = ours(form, **options)
            for layer_type in options["layer_types"]:
                assert_same(mine[layer_type], theirs.rope_parameters[layer_type])
    assert mine["full_attention"].rope_theta == 1e6
    assert mine["sliding_attention"].rope_theta == 1e4


def test_one_set_serves_all_layer_types_of_other_families() -> None:
    mine = ours({**SIZES, "rope_theta": 3.0}, layer_types=("full_attention", "sliding_attention"))
    assert mine["full_attention"] == mine["sliding_attention"]
    assert mine["full_attention"].rope_theta == 3.0


def test_a_theta_beside_rope_parameters_does_not_override_them() -> None:
    both = {**SIZES, "rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert ours(both)["full_attention"].rope_theta == 7.0
    del both["rope_parameters"]["rope_theta"]
    assert ours(both)["full_attention"].rope_theta == 5.0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_scaling": {"type": "mrope"}}, "rope type 'mrope'"),
        ({"rope_scaling": {"type": 3}}, "'type' = 3"),
        ({"rope_scaling": [1]}, "'rope_scaling' = .*an object"),
        ({"rope_scaling": {"type": "linear"}}, "has no 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "'factor' = -2"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "'factor' = 2"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "no 'low_freq_factor'"),
        ({"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "above 1"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "no 'long_factor'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1, 2]}}, "1 numbers"),
        ({"rope_theta": 0}, "'rope_theta' = 0"),
        ({"partial_rotary_factor": 1.5}, "'partial_rotary_factor' = 1.5"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 1.0}}}, "no 'full_attention'"),
        ({"max_position_embeddings": None}, "no 'max_position_embeddings'"),
    ],
)
def test_settings_that_cannot_be_used_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        ours({**SIZES, **keys})
    assert "org/model" in caught.value.message
