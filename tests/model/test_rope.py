"""Every kind of rotary frequencies is the one that transformers computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.rope import rope_parameters
from tightfit.errors import CheckpointError
from tightfit.model.families.common import rope
from tightfit.model.rope import dependence, frequencies

LONGEST = 4096
ORIGINAL = {"original_max_position_embeddings": 1024}
PAIRS = 16
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"factor": 4.0}),
    ("linear", {"factor": 2.5, "partial_rotary_factor": 0.5}),
    ("dynamic", {"factor": 2.0}),
    ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}),
    ("yarn", {"factor": 4.0, **ORIGINAL}),
    ("yarn", {"factor": 4.0, "truncate": False, **ORIGINAL}),
    ("yarn", {"factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.7, **ORIGINAL}),
    ("yarn", {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0, **ORIGINAL}),
    ("yarn", {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0, **ORIGINAL}),
    ("yarn", {"factor": 4.0, "beta_fast": 1e6, "beta_slow": 1e5, **ORIGINAL}),  # an empty range of dimensions
    (
        "longrope",
        {
            "short_factor": [1.0 + i / 9 for i in range(PAIRS)],
            "long_factor": [2.0 + i for i in range(PAIRS)],
            **ORIGINAL,
        },
    ),
    (
        "longrope",
        {
            "short_factor": [1.0] * PAIRS,
            "long_factor": [3.0] * PAIRS,
            "attention_factor": 1.3,
            "factor": 2.0,
            **ORIGINAL,
        },
    ),
]


@pytest.mark.parametrize(("kind", "settings"), KINDS)
@pytest.mark.parametrize("length", [17, 1024, 1025, LONGEST, 3 * LONGEST])
def test_frequencies_are_those_of_transformers(kind: str, settings: dict[str, Any], length: int) -> None:
    parameters = {"rope_type": kind, "rope_theta": 50_000.0, **settings}
    config = LlamaConfig(
        head_dim=2 * PAIRS, num_attention_heads=2, max_position_embeddings=LONGEST, rope_parameters=dict(parameters)
    )
    expected, expected_scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)

    ours = Config({"max_position_embeddings": LONGEST, "rope_parameters": parameters}, "test")
    found, scaling = frequencies(rope(rope_parameters(ours)["full_attention"], 2 * PAIRS), length)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # a few float32 roundings
    assert scaling == pytest.approx(expected_scaling, rel=1e-9)


def test_longrope_with_the_wrong_number_of_factors_is_refused() -> None:
    section = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0, 2.0], "factor": 2.0}
    parameters = rope_parameters(Config({"max_position_embeddings": 64, "rope_parameters": section}, "test"))
    with pytest.raises(CheckpointError, match="2 factors, but 4 pairs"):
        frequencies(rope(parameters["full_attention"], 8), 10)


def test_an_odd_number_of_rotated_features_is_refused() -> None:
    section = {"partial_rotary_factor": 0.5, "rope_theta": 100.0}
    parameters = rope_parameters(Config({"max_position_embeddings": 64, "rope_parameters": section}, "test"))
    with pytest.raises(CheckpointError, match="5 of 10 features"):
        rope(parameters["full_attention"], 10)


@pytest.mark.parametrize(("kind", "settings"), [("default", {}), *KINDS])
def test_frequencies_of_two_lengths_are_the_same_where_what_they_depend_on_is(
    kind: str, settings: dict[str, Any]
) -> None:
    parameters = {"rope_type": kind, "rope_theta": 50_000.0, **settings}
    config = Config({"max_position_embeddings": LONGEST, "rope_parameters": parameters}, "test")
    spec = rope(rope_parameters(config)["full_attention"], 2 * PAIRS)
    found: dict[int, list[float]] = {}
    for length in (17, 1024, 1025, LONGEST, LONGEST + 1, 3 * LONGEST):
        inverse, _ = frequencies(spec, length)
        assert found.setdefault(dependence(spec, length), inverse.tolist()) == inverse.tolist()
    assert len(found) == len(set(map(tuple, found.values()))) == {"dynamic": 3, "longrope": 2}.get(kind, 1)
