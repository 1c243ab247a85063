"""Configurations that cannot be computed are refused by name, never misread."""

from __future__ import annotations

from typing import Any

import pytest

from tightfit.checkpoints.config import Config
from tightfit.errors import CheckpointError
from tightfit.model.families import model_spec

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "bert"}, "architecture 'bert'"),
        ({"model_type": "llama", "hidden_act": "tanh"}, "'hidden_act' = tanh, expected one of silu"),
        ({"model_type": "llama", "num_key_value_heads": 3}, "expected a divisor of num_attention_heads"),
        ({"model_type": "llama", "num_hidden_layers": None}, "has no 'num_hidden_layers'"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "expected 2 times 'full_attention'"),
        ({"model_type": "gemma2", "layer_types": ["linear_attention"] * 2}, "expected 2 times 'full_attention'"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "an embedding model cannot generate"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "expected 0 or 1 for each of 2 layers"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, "expected 0 or 1 for each of 2 layers"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        model_spec(Config(SIZES | values, "test"), [])


def test_layers_that_compute_alike_are_of_one_kind() -> None:
    """The plan measures one layer of each kind."""
    spec = model_spec(Config(SIZES | {"model_type": "gemma2", "num_hidden_layers": 5}, "test"), [])
    assert spec.layers[0].kind != spec.layers[1].kind
    assert len({layer.kind for layer in spec.layers}) == 2
    assert [layer.attention.window for layer in spec.layers] == [4096, None, 4096, None, 4096]
