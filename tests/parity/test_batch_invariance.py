"""A sequence's bits do not depend on what else is in its batch, nor on how many tokens are decoded at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.harness import Ours, make, save, tokens_of
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3Config

from tightfit.model.batch import Segment

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 42,
    "intermediate_size": 75,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 32,
    "pad_token_id": None,
}
MODELS: dict[str, PreTrainedConfig] = {
    "dynamic rope and biases": LlamaConfig(
        **SIZES,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
    ),
    "soft caps and windows": Gemma2Config(
        **SIZES, sliding_window=11, attn_logit_softcapping=2.0, final_logit_softcapping=4.0
    ),
    "head norms": Qwen3Config(**SIZES),
    "experts": Qwen2MoeConfig(
        **SIZES,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=30,
        num_experts=6,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    ),
}
LENGTH, CHUNK = 60, 16


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(make(MODELS[request.param]), tmp_path)


def rows() -> list[list[int]]:
    model = make(MODELS["head norms"])
    return [tokens_of(model, LENGTH, seed) for seed in range(3)]


def test_prefill_and_decode_in_a_mixed_batch(folder: Path) -> None:
    """One sequence decodes, one prefills a chunk, one starts: together, and each alone."""
    a, b, c = rows()
    news = [
        Segment(0, 40, a[40:41], decode=True, logits="all"),
        Segment(1, 16, b[16:29], logits="all"),
        Segment(2, 0, c[:7], logits="all"),
    ]
    together = Ours(folder, context=LENGTH, chunk=CHUNK, sequences=3)
    together.sequence(a, [16, 32, 40], slot=0)
    together.sequence(b, [16], slot=1)
    alone = Ours(folder, context=LENGTH, chunk=CHUNK, sequences=3)
    alone.sequence(a, [16, 32, 40], slot=0)
    alone.sequence(b, [16], slot=1)
    for mixed, segment in zip(together.step(*news), news, strict=True):
        assert torch.equal(mixed, alone.step(segment)[0])


def test_tokens_verified_at_once_have_the_bits_of_tokens_decoded_one_by_one(folder: Path) -> None:
    tokens = rows()[0]
    one_by_one = Ours(folder, context=LENGTH, chunk=CHUNK).sequence(tokens, [16, *range(17, 60)])
    ours = Ours(folder, context=LENGTH, chunk=CHUNK)
    pieces = [ours.sequence(tokens, [16])]
    for start in range(16, 59, 5):
        draft = Segment(0, start, tokens[start : min(start + 5, 59)], decode=True, logits="all")
        pieces += ours.step(draft)
    assert torch.equal(torch.cat(pieces), one_by_one)
