"""Quantised checkpoints: two schemes are recognised, every other is refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tightfit.checkpoints import open_checkpoint
from tightfit.checkpoints.quantization import Fp8Blocks, Mxfp4, read_quantization
from tightfit.errors import CheckpointError

DEEPSEEK = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 64]}
GPT_OSS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}


def read(section: Any, **more: Any) -> object:
    return read_quantization({"quantization_config": section, **more}, [], "org/model")


def test_plain_weights_have_none() -> None:
    assert read_quantization({}, ["model.norm.weight"], "org/model") is None
    assert read(None) is None
    assert read({}) is None


def test_block_scaled_fp8_and_mxfp4_are_recognised() -> None:
    assert read(DEEPSEEK) == Fp8Blocks((128, 64))
    assert read(GPT_OSS) == Mxfp4(group=32)


def test_a_wrapper_may_declare_it_inside() -> None:
    config = {"text_config": {"quantization_config": DEEPSEEK}}
    assert read_quantization(config, [], "org/model") == Fp8Blocks((128, 64))


@pytest.mark.parametrize(
    ("section", "name"),
    [
        *(({"quant_method": method}, method) for method in ("gptq", "awq", "bitsandbytes", "hqq", "eetq", "torchao")),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 4}, "an unnamed method"),
        ({"quant_method": "fp8"}, "fp8 without 'weight_block_size'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "fp8 without 'weight_block_size'"),
    ],
)
def test_every_other_method_is_refused_by_name(section: dict[str, Any], name: str) -> None:
    with pytest.raises(CheckpointError, match=f"org/model is quantised with {name}") as caught:
        read(section)
    assert "unquantised" in caught.value.hint


def test_the_older_key_of_compressed_tensors_counts() -> None:
    with pytest.raises(CheckpointError, match="compressed-tensors"):
        read_quantization({"compression_config": {"quant_method": "compressed-tensors"}}, [], "org/model")


def test_a_malformed_declaration_is_refused() -> None:
    for section in ("gptq", [1], {"quant_method": "fp8", "weight_block_size": [0, 128]}):
        with pytest.raises(CheckpointError):
            read(section)


def test_packed_weights_that_nothing_declares_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"q_proj.qweight"):
        read_quantization({}, ["model.norm.weight", "model.layers.0.self_attn.q_proj.qweight"], "org/model")


def test_opening_a_checkpoint_applies_it(make_model: Callable[..., Path]) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    with pytest.raises(CheckpointError, match="awq"):
        open_checkpoint(str(make_model("refused", config=config)))
    with open_checkpoint(str(make_model("known", config={"quantization_config": DEEPSEEK}))) as model:
        assert model.quantization == Fp8Blocks((128, 64))
