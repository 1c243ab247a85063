"""Writes checkpoints of random weights at real sizes, tensor by tensor, for measuring speed and memory.

python tests/random_model.py FOLDER [--preset 1b]
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tightfit import zoo

# The shapes of TinyLlama with the vocabulary of the published baselines, of a 3B model, of a small model that is mostly
# vocabulary, and of a mixture of 1.7 billion parameters of which a token uses 0.3. The small mixtures are for tests.
PRESETS = {
    "1b": {"hidden": 2048, "layers": 22, "heads": 32, "kv_heads": 4, "ffn": 5632, "vocab": 19219},
    "3b": {"hidden": 3072, "layers": 28, "heads": 24, "kv_heads": 8, "ffn": 8192, "vocab": 32000},
    "wide": {"hidden": 512, "layers": 12, "heads": 8, "kv_heads": 4, "ffn": 1536, "vocab": 98304},
    "moe": {"hidden": 1024, "layers": 16, "heads": 16, "kv_heads": 8, "ffn": 512, "vocab": 19219, "experts": 64},
    "small-moe": {"hidden": 1024, "layers": 6, "heads": 16, "kv_heads": 4, "ffn": 512, "vocab": 6144, "experts": 32},
    "tiny-moe": {"hidden": 64, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 32, "vocab": 6144, "experts": 16},
}
EXPERTS_PER_TOKEN = 8
BLOCK = (1 << 22) - 3  # numbers made once; odd, so that rows do not repeat


def config(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, experts: int = 0
) -> dict[str, object]:
    """A llama's config.json, or a Mixtral's with ``experts``."""
    mixture = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "sliding_window": None,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
        **(mixture if experts else {}),
    }


def shapes(settings: dict[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of a llama checkpoint, or of a Mixtral's."""

    def size(key: str) -> int:
        return int(str(settings[key]))

    hidden, ffn, dim = size("hidden_size"), size("intermediate_size"), size("head_dim")
    width, kv_width = size("num_attention_heads") * dim, size("num_key_value_heads") * dim
    yield "model.embed_tokens.weight", (size("vocab_size"), hidden)
    for layer in range(size("num_hidden_layers")):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (width, hidden)
        yield prefix + "self_attn.k_proj.weight", (kv_width, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv_width, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, width)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        if "num_local_experts" in settings:
            yield prefix + "block_sparse_moe.gate.weight", (size("num_local_experts"), hidden)
            for expert in range(size("num_local_experts")):
                each = f"{prefix}block_sparse_moe.experts.{expert}."
                yield each + "w1.weight", (ffn, hidden)
                yield each + "w3.weight", (ffn, hidden)
                yield each + "w2.weight", (hidden, ffn)
            continue
        yield prefix + "mlp.gate_proj.weight", (ffn, hidden)
        yield prefix + "mlp.up_proj.weight", (ffn, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (size("vocab_size"), hidden)


def write(folder: Path, preset: str = "1b", seed: int = 0) -> Path:
    """A llama-shaped checkpoint in bfloat16 with the embedded model's tokenizer; nothing is done if it is there."""
    if (folder / "config.json").exists():
        return folder
    settings = config(**PRESETS[preset])
    write_headers(folder, settings)
    # One block of numbers for all tensors, from a different place each time: making a billion takes a minute.
    values = np.random.default_rng(seed).standard_normal(BLOCK, np.float32) * 0.02
    numbers = (values.view(np.uint32) >> 16).astype(np.uint16)
    ones = np.full(BLOCK, 0x3F80, np.uint16)
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        for index, (name, shape) in enumerate(shapes(settings)):
            left = int(np.prod(shape))
            source = ones if len(shape) == 1 else np.roll(numbers, 7919 * index)
            if "num_local_experts" in settings and name.startswith("model.embed_tokens"):
                source = source + (5 << 7)  # 32 times as large: which experts are chosen shall depend on the token
            while left:
                left -= file.write(source[:left].tobytes()) // 2
    return folder


def write_headers(folder: Path, settings: dict[str, object]) -> Path:
    """A checkpoint whose numbers are a hole in the file: all zeros, and nothing on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, object] = {}
    offset = 0
    for name, shape in shapes(settings):
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(zoo.path("nano") / name, folder / name)
    (folder / "config.json").write_text(json.dumps(settings, indent=1))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="1b", choices=sorted(PRESETS))
    arguments = parser.parse_args()
    print(write(arguments.folder, arguments.preset))
