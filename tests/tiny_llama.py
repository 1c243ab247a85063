"""Writes a small random llama with the embedded model's tokenizer: a model to damage, that opens in no time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tightfit import zoo

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, VOCAB = 32, 4, 2, 48, 2, 6144
CONTEXT = 256
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Each message between its role and the end token, as most templates do it.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|bos|>{{ message.role }}\n{{ message.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)


def tensors(seed: int = 0, vocab: int = VOCAB, layers: int = LAYERS) -> dict[str, np.ndarray]:
    """Every tensor of the model, by name."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, cols: int) -> np.ndarray:
        return (rng.standard_normal((rows, cols)) / cols**0.5).astype(np.float32)

    head_dim = HIDDEN // HEADS
    made = {"model.embed_tokens.weight": matrix(vocab, HIDDEN), "lm_head.weight": matrix(vocab, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        made |= {
            prefix + "input_layernorm.weight": np.ones(HIDDEN, np.float32),
            prefix + "post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            prefix + "self_attn.q_proj.weight": matrix(HEADS * head_dim, HIDDEN),
            prefix + "self_attn.k_proj.weight": matrix(KV_HEADS * head_dim, HIDDEN),
            prefix + "self_attn.v_proj.weight": matrix(KV_HEADS * head_dim, HIDDEN),
            prefix + "self_attn.o_proj.weight": matrix(HIDDEN, HEADS * head_dim),
            prefix + "mlp.gate_proj.weight": matrix(FFN, HIDDEN),
            prefix + "mlp.up_proj.weight": matrix(FFN, HIDDEN),
            prefix + "mlp.down_proj.weight": matrix(HIDDEN, FFN),
        }
    return made | {"model.norm.weight": np.ones(HIDDEN, np.float32)}


def write(
    folder: Path, *, shards: int = 1, chat: bool = False, vocab: int = VOCAB, layers: int = LAYERS, **config: Any
) -> Path:
    """The model in ``folder``; keys of ``config`` replace those of config.json, and None removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    changes = {"vocab_size": vocab, "num_hidden_layers": layers} | config
    settings = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    save(folder, tensors(vocab=vocab, layers=layers), shards)
    nano = zoo.path("nano")
    shutil.copy(nano / "tokenizer.json", folder)
    tokenizer = json.loads((nano / "tokenizer_config.json").read_text())
    if chat:
        tokenizer["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def save(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """``tensors`` as one file, or as several with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % shards == shard}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
