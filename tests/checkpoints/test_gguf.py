"""GGUF files open as checkpoints: which files, what is refused, and what it takes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import gguf_files, tiny_llama
from tests.measure import run_measured
from transformers import LlamaConfig, LlamaForCausalLM

from tightfit.checkpoints.checkpoint import open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.checkpoints.gguf.config import config_of
from tightfit.errors import CheckpointError
from tightfit.model.families import model_spec
from tightfit.weights.placement.read import check

MIB = 1 << 20


def test_a_file_says_what_a_folder_does(tmp_path: Path) -> None:
    folder = tiny_llama.write(tmp_path / "folder")
    with open_checkpoint(str(gguf_files.tiny(tmp_path / "m.gguf"))) as model, open_checkpoint(str(folder)) as original:
        shapes = {name: (info.dtype, info.shape) for name, info in model.tensors.items()}
        assert shapes == {name: (info.dtype, info.shape) for name, info in original.tensors.items()}
        same = ("hidden_size", "num_key_value_heads", "rms_norm_eps", "rope_theta", "vocab_size", "bos_token_id")
        assert {key: model.config[key] for key in same} == {key: original.config[key] for key in same}
        info = model.tensors["model.layers.1.mlp.up_proj.weight"]
        numbers = np.empty(info.shape, np.float32)
        model.read_into(info, 0, numbers.data)
        assert np.array_equal(numbers, tiny_llama.tensors()[info.name])
        assert model.generation.eos_token_ids == (1, 5)
        assert model.tokenizer().encode("Once") == original.tokenizer().encode("Once", add_special_tokens=False)


def test_the_chat_template_comes_from_the_file(tmp_path: Path) -> None:
    template = {"tokenizer.chat_template": "{% for message in messages %}<{{ message.content }}>{% endfor %}"}
    with open_checkpoint(str(gguf_files.tiny(tmp_path / "m.gguf", **template))) as model:
        assert model.tokenizer().render_chat([{"role": "user", "content": "Hi"}]) == "<Hi>"


def test_a_folder_with_one_model_opens(tmp_path: Path) -> None:
    first = gguf_files.tiny(tmp_path / "a.gguf")
    shutil.copy(first, tmp_path / "mmproj-a.gguf")  # what it sees with
    (tmp_path / "config.json").write_text("{}")  # as repositories of the hub have it
    with open_checkpoint(str(tmp_path)) as model:
        assert model.name == "a.gguf"
    shutil.copy(first, tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"holds 2 models: a\.gguf, b\.gguf in GGUF") as caught:
        open_checkpoint(str(tmp_path))
    assert caught.value.hint == "Give the path of one file."


def test_all_parts_are_one_model(tmp_path: Path) -> None:
    whole = gguf_files.tiny(tmp_path / "whole.gguf")
    gguf_files.tiny(tmp_path / "parts" / "m.gguf" if (tmp_path / "parts").mkdir() is None else whole, parts=3)
    parts = sorted((tmp_path / "parts").iterdir())
    assert [part.name for part in parts] == [f"m-0000{index}-of-00003.gguf" for index in (1, 2, 3)]
    with open_checkpoint(str(whole)) as one:
        for path in (tmp_path / "parts", parts[0], parts[2]):
            with open_checkpoint(str(path)) as several:
                assert several.config == one.config
                assert several.tensors.keys() == one.tensors.keys()
                assert len({info.file for info in several.tensors.values()}) == 3
                assert several.tokenizer().encode("Once") == one.tokenizer().encode("Once")
    parts[1].rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"1 of 3 parts of .* are missing: m-00002-of-00003\.gguf"):
        open_checkpoint(str(parts[0]))
    parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match=r"alone.gguf is one of 3 parts, and 1 were found"):
        open_checkpoint(str(tmp_path / "alone.gguf"))


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.001, 0.05, 0.2, 0.9, 0.9999])
def test_truncated_files_are_refused(tmp_path: Path, share: float) -> None:
    path = gguf_files.tiny(tmp_path / "model.gguf", "Q8_0")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"model\.gguf is not a whole GGUF file") as caught:
        open_checkpoint(str(path))
    assert "download it again" in caught.value.hint


def test_files_of_noise_are_refused(tmp_path: Path) -> None:
    path = gguf_files.tiny(tmp_path / "model.gguf", "Q8_0")
    content = bytearray(path.read_bytes())
    generator = np.random.default_rng(0)
    for _ in range(5):
        content[8:] = generator.bytes(len(content) - 8)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.gguf"):
            open_checkpoint(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "of the architecture 'mamba', which does not open from GGUF"),
        ({".block_count": None}, "no 'llama.block_count'"),
        ({".attention.head_count_kv": [2, 4]}, "layers or heads of .* differ in size"),
        ({".attention.value_length": 16}, "layers or heads of .* differ in size"),
        ({".attention.scale": 0.5}, "'llama.attention.scale' = 0.5, which is not known"),
        ({".rope.scaling.type": "ntk"}, "asks for rope type 'ntk'"),
        ({".block_count": 1}, "tensor 'model.layers.1.* describes 1 layers"),
        ({"architecture": "gemma2"}, "no tensor 'model.layers.0.post_attention_layernorm.weight'"),
        ({".embedding_length": "many"}, "'hidden_size' = many, expected an integer"),
        ({".attention.layer_norm_rms_epsilon": "low"}, "is not a whole GGUF file: "),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = gguf_files.tiny(tmp_path / "model.gguf", **changes)
    with pytest.raises(CheckpointError, match=message):
        check_weights(path)


def test_tensors_that_would_be_left_out_are_refused(tmp_path: Path) -> None:
    config = LlamaConfig(**{**tiny_llama.CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})
    model = LlamaForCausalLM(config)
    name = "blk.1.ffn_up.bias"  # of gate and down there are none
    tensors = {key: (numbers, "F32") for key, (numbers, _) in gguf_files.tensors_of(model).items()}
    tensors[name] = np.ones(tiny_llama.FFN, np.float32), "F32"
    path = gguf_files.save(tmp_path / "m.gguf", "llama", gguf_files.settings(config.to_dict()), tensors)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.up_proj\.bias', which 'llama' has no use for"):
        check_weights(path)


def check_weights(path: Path) -> None:
    with open_checkpoint(str(path)) as model:
        check(model, model_spec(Config(model.config, model.name), model.tensors))


def test_unknown_types_are_refused_by_name(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": (np.zeros((4, 84), np.uint8), "Q2_K")}
    path = gguf_files.save(tmp_path / "model.gguf", "llama", gguf_files.settings(tiny_llama.CONFIG), tensors)
    with pytest.raises(CheckpointError, match=r"'token_embd.weight' of .*model\.gguf is of type Q2_K") as caught:
        open_checkpoint(str(path))
    assert "Q4_K" in caught.value.hint


def test_unknown_tensors_are_refused_by_name(tmp_path: Path) -> None:
    tensors = {name: (np.zeros((4, 4), np.float32), "F32") for name in ("token_embd.weight", "blk.0.attn_sinks.weight")}
    path = gguf_files.save(tmp_path / "model.gguf", "llama", gguf_files.settings(tiny_llama.CONFIG), tensors)
    with pytest.raises(CheckpointError, match=r"has tensor 'blk.0.attn_sinks.weight', which the architecture 'llama'"):
        open_checkpoint(str(path))


@pytest.mark.parametrize(("layers", "scalar"), [(26, 256), (46, 4608 / 32)])
def test_the_largest_gemma_scales_its_queries_otherwise(layers: int, scalar: float) -> None:
    values = {"block_count": layers, "embedding_length": 4608, "feed_forward_length": 8, "context_length": 8192}
    values |= {"attention.head_count": 32, "attention.key_length": 256, "attention.value_length": 256}
    values |= {"attention.layer_norm_rms_epsilon": 1e-6}
    metadata = {f"gemma2.{key}": value for key, value in values.items()} | {"general.architecture": "gemma2"}
    config = config_of(metadata.get, {"token_embd.weight": (8, 4608)}, None, "model.gguf")
    assert config["query_pre_attn_scalar"] == scalar


def test_a_large_vocabulary_takes_little_memory(tmp_path: Path) -> None:
    """Not even in the process that reads it, where the package alone would take 600 MiB."""
    tokens = [f"token{index}é" for index in range(128_000)]
    metadata = gguf_files.settings(tiny_llama.CONFIG) | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": [f"{tokens[index]} {tokens[-index]}" for index in range(len(tokens))] * 2,
    }
    tensors = {"token_embd.weight": (np.zeros((128_000, 8), np.float16), "F16")}
    path = gguf_files.save(tmp_path / "model.gguf", "llama", metadata, tensors)
    code = """
import json, resource, sys
from tightfit.checkpoints.checkpoint import open_checkpoint
with open_checkpoint(sys.argv[1]) as model, model.small_files() as folder:
    assert len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) == 128_000
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""
    opened = "import sys; from tightfit.checkpoints.checkpoint import open_checkpoint; open_checkpoint(sys.argv[1])"
    done = run_measured([sys.executable, "-c", code, path])
    assert done.exit_code == 0, done.stderr
    assert int(done.stdout) < 250 * MIB
    small = gguf_files.tiny(tmp_path / "small.gguf")
    both = [run_measured([sys.executable, "-c", opened + "; import resource; " + REPORT, one]) for one in (path, small)]
    large, little = (int(done.stdout) for done in both)
    assert large - little < 2 * MIB  # tokens stay where they are until a tokenizer is wanted


REPORT = "print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024)"


def test_the_config_is_plain_json(tmp_path: Path) -> None:
    with open_checkpoint(str(gguf_files.tiny(tmp_path / "m.gguf"))) as model, model.small_files() as folder:
        assert json.loads((folder / "config.json").read_text()) == model.config
        left = folder
    assert not left.exists()
