"""Writes models of transformers as GGUF, as llama.cpp's converter does, in any type of tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tests import tiny_llama
from transformers import PreTrainedModel

from tightfit import zoo

Type = gguf.GGMLQuantizationType
# transformers' model_type -> gguf's architecture
ARCHITECTURES = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss",
}
BY_NAME = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
# Of the types that the package cannot write, blocks of random bytes: where they have a float16, and which one makes
# numbers of about the size 1 around zero.
RANDOM = {"Q4_K": {0: 0.004, 2: 0.03}, "Q5_K": {0: 0.0015, 2: 0.0225}, "Q6_K": {208: 0.0007}}


def random_blocks(kind: str, rows: int, cols: int, size: float, seed: int = 0) -> np.ndarray:
    """(rows, bytes) of numbers of about the size ``size``."""
    inputs, nbytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows * cols // inputs, nbytes), dtype=np.uint8)
    for place, factor in RANDOM[kind].items():
        numbers = generator.uniform(0.5, 1.5, len(blocks)) * factor * size
        blocks[:, place : place + 2] = numbers.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def stored(matrix: np.ndarray, kind: str) -> np.ndarray:
    """``matrix`` (..., cols) in a type; one that the package cannot write is filled with random numbers of the same
    size."""
    if kind in RANDOM:
        rows = random_blocks(kind, matrix.size // matrix.shape[-1], matrix.shape[-1], float(matrix.std()))
        return rows.reshape(*matrix.shape[:-1], -1)
    return gguf.quants.quantize(matrix, Type[kind])


def permuted(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as llama.cpp's converter puts them: the halves of each head in turn."""
    return matrix.reshape(heads, 2, -1, *matrix.shape[1:]).swapaxes(1, 2).reshape(matrix.shape)


def unpermuted(matrix: np.ndarray, heads: int) -> np.ndarray:
    return matrix.reshape(heads, -1, 2, *matrix.shape[1:]).swapaxes(1, 2).reshape(matrix.shape)


Values = Mapping[str, Any]
Tensor = tuple[np.ndarray, str]  # raw bytes or numbers, and their type


def save(path: Path, architecture: str, metadata: Values, tensors: Mapping[str, Tensor], parts: int = 1) -> Path:
    """A file, or ``parts`` of them; metadata of the architecture have keys that begin with a dot."""
    each = 0 if parts == 1 else -(-len(tensors) // parts)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=each)
    for key, value in metadata.items():
        name = f"{architecture}{key}" if key.startswith(".") else key
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            kind = {str: "string", bool: "bool", int: "uint32", float: "float32"}[type(value)]
            getattr(writer, f"add_{kind}")(name, value)
    for name, (raw, kind) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=Type[kind])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def settings(config: Values) -> dict[str, Any]:
    """The metadata of a configuration of transformers that all architectures have."""
    heads = config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    experts = config.get("num_experts") or config.get("num_local_experts")
    return {
        ".context_length": config["max_position_embeddings"],
        ".embedding_length": config["hidden_size"],
        ".block_count": config["num_hidden_layers"],
        ".feed_forward_length": config["intermediate_size"],
        ".attention.head_count": heads,
        ".attention.head_count_kv": config["num_key_value_heads"],
        ".attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        ".attention.key_length": dim,
        ".attention.value_length": dim,
        ".rope.dimension_count": dim,
        ".rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
        ".expert_count": experts,
        ".expert_used_count": config["num_experts_per_tok"] if experts else None,
    }


@torch.no_grad()
def write(
    path: Path,
    model: PreTrainedModel,
    kind: str | Callable[[str], str] = "F32",
    metadata: Values | None = None,
    parts: int = 1,
) -> Path:
    """Writes ``model`` with its matrices in a type, or in one for each name in GGUF, and sets those of the model to
    what they mean."""
    tensors: dict[str, Tensor] = {}
    if model.config.rope_parameters.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = rope_factors(model), "F32"
    for name, (numbers, put) in tensors_of(model).items():
        # routers and biases are always float32
        matrix = numbers.ndim > 1 and "ffn_gate_inp" not in name and name.endswith(".weight")
        own = (kind if isinstance(kind, str) else kind(name)) if matrix else "F32"
        raw = stored(numbers, own)
        tensors[name] = raw, own
        put(gguf.quants.dequantize(raw, Type[own]).reshape(numbers.shape))
    values = settings(model.config.to_dict()) | dict(metadata or {})
    return save(path, ARCHITECTURES[model.config.model_type], values, tensors, parts)


def tiny(path: Path, kind: str = "F32", parts: int = 1, **changes: Any) -> Path:
    """The model of tiny_llama with the embedded model's tokenizer, its matrices in a type where their rows are whole
    blocks of it; ``changes`` are metadata, and None takes a key out."""
    names = gguf.get_tensor_name_map(BY_NAME["llama"], tiny_llama.LAYERS)
    heads = {".q_proj.": tiny_llama.HEADS, ".k_proj.": tiny_llama.KV_HEADS}
    tensors: dict[str, Tensor] = {}
    for key, numbers in tiny_llama.tensors().items():
        name = names.get_name(key, try_suffixes=(".weight",))
        assert name is not None
        for part, count in heads.items():
            numbers = permuted(numbers, count) if part in key else numbers
        fits = numbers.ndim > 1 and numbers.shape[-1] % gguf.GGML_QUANT_SIZES[Type[kind]][0] == 0
        own = kind if fits else "F32"
        tensors[name] = stored(numbers, own), own
    values = settings(tiny_llama.CONFIG) | vocabulary() | changes
    return save(path, values.pop("architecture", "llama"), values, tensors, parts)


def large(path: Path, kind: str, hidden: int = 1024, ffn: int = 2816, layers: int = 8) -> Path:
    """A random llama of 100 million parameters with the embedded model's tokenizer, in a type of :data:`RANDOM`."""
    config = tiny_llama.CONFIG | {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    width, kv_width = hidden, hidden // 4
    shapes = {"attn_q": (width, hidden), "attn_k": (kv_width, hidden), "attn_v": (kv_width, hidden)}
    shapes |= {"attn_output": (hidden, width), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden)}
    shapes |= {"ffn_down": (hidden, ffn)}
    blocks = {shape: random_blocks(kind, *shape, shape[1] ** -0.5) for shape in {*shapes.values(), (6144, hidden)}}
    ones = np.ones(hidden, np.float32), "F32"
    outer = blocks[6144, hidden], kind
    tensors: dict[str, Tensor] = {"token_embd.weight": outer, "output.weight": outer, "output_norm.weight": ones}
    for layer in range(layers):
        tensors |= {f"blk.{layer}.{name}.weight": (blocks[shape], kind) for name, shape in shapes.items()}
        tensors |= {f"blk.{layer}.{name}.weight": ones for name in ("attn_norm", "ffn_norm")}
    return save(path, "llama", settings(config) | vocabulary(), tensors)


def vocabulary(pre: str = "qwen2") -> dict[str, Any]:
    """The metadata of the embedded model's tokenizer, but for how it splits text."""
    made = json.loads((zoo.path("nano") / "tokenizer.json").read_text())
    tokens = sorted(made["model"]["vocab"], key=made["model"]["vocab"].get)
    control = {token["content"] for token in made["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in made["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in control else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def rope_factors(model: PreTrainedModel) -> np.ndarray:
    """What llama 3's rope divides frequencies by."""
    rope = model.config.rope_parameters
    dim = 2 * len(model.model.rotary_emb.inv_freq)
    plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return (plain / model.model.rotary_emb.inv_freq.double()).float().numpy()


Put = Callable[[np.ndarray], None]


def tensors_of(model: PreTrainedModel) -> dict[str, tuple[np.ndarray, Put]]:
    """By their names in GGUF: float32 numbers, and a function that puts such numbers back into the model."""
    config = model.config
    family = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(BY_NAME[family], config.num_hidden_layers)
    tensors: dict[str, tuple[np.ndarray, Put]] = {}
    for key, parameter in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        add = 1.0 if family.startswith("gemma") and key.endswith("norm.weight") else 0.0
        heads = 0
        if family == "llama" and ".q_proj." in key:
            heads = config.num_attention_heads
        elif family == "llama" and ".k_proj." in key:
            heads = config.num_key_value_heads

        def part(key: str, target: torch.Tensor, add: float = add, heads: int = heads) -> None:
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            assert name is not None, key
            name = f"{name}.weight" if name.endswith("_sinks") else name
            numbers = (target + add).float().contiguous().numpy()

            def put(values: np.ndarray) -> None:
                target.copy_(torch.from_numpy(unpermuted(values, heads) if heads else values) - add)

            tensors[name] = permuted(numbers, heads) if heads else numbers, put

        stem = key.removesuffix("_bias")
        if family == "gpt-oss" and ".experts." in key:  # inputs first, gate and up in turn
            kind = "bias" if stem != key else "weight"
            rows = parameter if kind == "bias" else parameter.transpose(1, 2)
            if stem.endswith("gate_up_proj"):
                part(stem.replace("gate_up_proj", f"gate_proj.{kind}"), rows[:, ::2])
                part(stem.replace("gate_up_proj", f"up_proj.{kind}"), rows[:, 1::2])
            else:
                part(f"{stem}.{kind}", rows)
        elif key.endswith("mlp.experts.gate_up_proj"):
            width = parameter.shape[1] // 2
            part(key.replace("gate_up_proj", "gate_proj.weight"), parameter[:, :width])
            part(key.replace("gate_up_proj", "up_proj.weight"), parameter[:, width:])
        elif key.endswith("mlp.experts.down_proj"):
            part(f"{key}.weight", parameter)
        else:
            part(key, parameter)
    return tensors
