"""Resident experts: as many as there are, over memory that was planned, and made in no time."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.budget.meter import resident_set
from tightfit.checkpoints.config import Config
from tightfit.checkpoints.safetensors_file import TensorInfo
from tightfit.model.families import model_spec
from tightfit.model.spec import ModelSpec, Param, Source
from tightfit.weights.placement.places import check, groups
from tightfit.weights.placement.resident import Resident

# Qwen3-30B-A3B: 128 experts in each of 48 layers, 18432 matrices.
QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}


def headers(spec: ModelSpec) -> Any:
    """A checkpoint of which only the headers are known."""
    keys = [
        (param.source.key.format(expert=expert), param.shape)
        for _, param in spec.all_params()
        for expert in range(max(param.experts, 1))
    ]
    tensors = {key: TensorInfo(key, "BF16", shape, "f", 0, 2 * math.prod(shape)) for key, shape in keys}
    return SimpleNamespace(name="x", tensors=tensors, quantization=None, is_gguf=False, compressed=None, config={})


def test_a_model_of_18432_expert_matrices_is_described_and_placed_in_a_moment() -> None:
    spec = model_spec(Config(QWEN3_30B, "x"), ())
    assert spec.parameter_count == 30_532_122_624  # what the model card says
    checkpoint = headers(spec)
    before, start = resident_set().current, time.perf_counter()
    check(checkpoint, spec)
    formats = dict.fromkeys(range(48), "int4")
    nbytes = sum(group.nbytes for group in groups(checkpoint, spec, "int4", formats))
    placement = Resident(checkpoint, spec, "int4", formats, torch.float32, Arena(nbytes))
    assert time.perf_counter() - start < 2.0  # a tenth of a second on an idle core
    assert resident_set().current - before < 8 << 20  # kept, the matrices alone would take about 18 MB
    assert placement.nbytes == nbytes


@pytest.mark.parametrize("fmt", ["own", "int8"])
def test_each_expert_is_the_matrix_that_the_checkpoint_holds(fmt: str, write: Any) -> None:
    stored, biases = torch.randn(3, 10, 32), torch.randn(3, 10)
    checkpoint = write({"e": stored, "b": biases})
    params = (
        Param("e", (10, 32), Source("e", stacked=True), experts=3),
        Param("b", (10,), Source("b", stacked=True), experts=3),
    )
    spec = ModelSpec("x", 1, 1, (), params, 1, 1e-6)
    placement = Resident(checkpoint, spec, fmt, {}, torch.float32, Arena(1 << 16))
    loaded: list[int] = []
    placement.load(loaded.append)
    assert sum(loaded) == placement.nbytes
    assert torch.equal(placement.model["b"], biases)
    # Half a step of 8 bits, which the search for the smallest error may make an eighth longer.
    tolerance = 0.0 if fmt == "own" else float(stored.abs().max()) / 127 * 0.57
    for expert in range(3):
        found = torch.empty(10, 32)
        placement.model["e"][expert].decode(torch.arange(10), found, Workspace(Arena(1 << 20)))
        assert (found - stored[expert]).abs().max() <= tolerance
