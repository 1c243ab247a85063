"""Parity of llama with transformers, with every kind of rope in both forms of config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.harness import (
    TOLERANCE,
    Ours,
    check_all_paths,
    check_edits,
    difference,
    edit_attention,
    edit_mlp,
    edit_model,
    edit_rope,
    make,
    save,
    theirs,
    tokens_of,
    without,
)
from transformers import LlamaConfig, PreTrainedModel

from tightfit.model.batch import Segment

# Odd sizes, three heads to each key-value head, a head_dim that is not hidden_size / heads, an eps that matters.
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 42,
    "intermediate_size": 75,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 32,  # inputs are 70 tokens long
    "rms_norm_eps": 0.05,
}
ORIGINAL = {"original_max_position_embeddings": 24}
# Kinds of rope as config.json names them, and settings whose change must be noticed.
ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {"rope_theta": 3000.0}),
    "linear": ({"factor": 3.0}, {"factor": 1.0}),
    "dynamic": ({"factor": 3.0}, {"factor": 1.0}),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
        {"factor": 1.0, "low_freq_factor": 0.5, "high_freq_factor": 8.0, "original_max_position_embeddings": 32},
    ),
    "yarn": (
        # betas between which some of the five frequencies lie
        {
            "factor": 4.0,
            "beta_fast": 1.5,
            "beta_slow": 0.3,
            "truncate": False,
            "original_max_position_embeddings": 48,
        },
        {
            "factor": 1.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": True,
            "original_max_position_embeddings": 32,
            "attention_factor": 1.0,
        },
    ),
    "longrope": (
        {
            "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0],
            "long_factor": [1.0, 2.0, 4.0, 8.0, 9.0],
            "factor": 4.0,
            **ORIGINAL,
        },
        {"long_factor": (1.0, 1.1, 1.3, 1.6, 2.0), "attention_factor": 1.0, "original_max_position_embeddings": 200},
    ),
}
# There the frequencies of all sequences of a batch follow its longest; ours follow each sequence's own length.
BY_LENGTH = ("dynamic", "longrope")


def model_with(kind: str, settings: dict[str, Any]) -> PreTrainedModel:
    return make(LlamaConfig(**SIZES, rope_parameters={"rope_type": kind, "rope_theta": 500.0, **settings}))


@pytest.mark.parametrize("kind", ROPES)
def test_every_kind_of_rope(tmp_path: Path, kind: str) -> None:
    settings, changes = ROPES[kind]
    model = model_with(kind, settings)
    save(model, tmp_path)
    check_all_paths(model, tmp_path, ragged="alone" if kind in BY_LENGTH else "batch")
    edits = {name: edit_rope(**{name: value}) for name, value in changes.items()}
    if kind != "default":
        edits["kind"] = edit_rope(rope_type="default")
    check_edits(model, tmp_path, edits)


@pytest.mark.parametrize("kind", ROPES)
def test_rope_in_the_form_of_transformers_4(tmp_path: Path, kind: str) -> None:
    settings, _ = ROPES[kind]
    model = model_with(kind, settings)
    scaling = None if kind == "default" else {"type": kind, **settings}
    save(model, tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling)
    tokens = tokens_of(model, 70)
    ours = Ours(tmp_path, context=70, chunk=70).sequence(tokens, [70])
    assert difference(ours, theirs(model, tokens, [70])) < TOLERANCE


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_a_chunked_prefill_uses_the_frequencies_of_the_whole_prompt(tmp_path: Path, kind: str) -> None:
    model = model_with(kind, ROPES[kind][0])
    save(model, tmp_path)
    tokens = tokens_of(model, 70)
    ours = Ours(tmp_path, context=70, chunk=16)
    segments = [Segment(0, at, tokens[at : at + 16], logits="all", length=70) for at in range(0, 70, 16)]
    logits = torch.cat([part for segment in segments for part in ours.step(segment)])
    assert difference(logits, theirs(model, tokens, [70])) < TOLERANCE


def test_biases_and_norms(tmp_path: Path) -> None:
    model = make(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True))
    save(model, tmp_path)
    check_all_paths(model, tmp_path)
    biases = [f"{name}_proj.bias" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    edits = {name: without(name) for name in (*biases, "input_layernorm", "pre_feedforward_layernorm")}
    edits |= {
        "scale": edit_attention(scale=0.2),
        "activation": edit_mlp(activation="gelu"),
        "rope": edit_attention(rope=None),
    }
    check_edits(model, tmp_path, edits | {"eps": edit_model(rms_norm_eps=1e-6)})


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_other_activations_and_tied_embeddings(tmp_path: Path, activation: str) -> None:
    model = make(LlamaConfig(**SIZES, hidden_act=activation, tie_word_embeddings=True))
    save(model, tmp_path)
    assert Ours(tmp_path, context=70, chunk=70).spec.tied
    check_all_paths(model, tmp_path)
    check_edits(model, tmp_path, {"activation": edit_mlp(activation="silu")})


def test_old_files_without_the_keys_of_newer_ones(tmp_path: Path) -> None:
    """The first llama checkpoints have no num_key_value_heads, head_dim, biases or rope_theta."""
    sizes = SIZES | {"num_key_value_heads": 6, "head_dim": 8, "hidden_size": 48}
    model = make(LlamaConfig(**sizes))
    absent = dict.fromkeys(
        ["num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "rope_parameters", "tie_word_embeddings"]
    )
    save(model, tmp_path, **absent)
    tokens = tokens_of(model, 40)
    ours = Ours(tmp_path, context=40, chunk=40).sequence(tokens, [40])
    assert difference(ours, theirs(model, tokens, [40])) < TOLERANCE
