"""Families: from config.json to the parts of a decoder. One small file each, a list of parts.

Adding a family is adding a file with a function ``spec(config, names) -> ModelSpec`` and its line in ``FAMILIES``;
``names`` are the names of the checkpoint's tensors, for families that are saved in more than one form.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection

from tightfit.checkpoints.config import Config
from tightfit.errors import CheckpointError
from tightfit.model.spec import ModelSpec

MOST_LAYERS = 1000

# model_type in config.json -> module of this package
FAMILIES = {
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt_oss",
    "granite": "granite",
    "lckv-llama": "lckv_llama",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "olmo2": "olmo2",
    "olmoe": "olmoe",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "smollm3": "smollm3",
}


def model_spec(config: Config, names: Collection[str]) -> ModelSpec:
    """The architecture of a checkpoint. Raises CheckpointError for a family that is not known."""
    module = FAMILIES.get(config.model_type)
    if module is None:
        raise CheckpointError(
            f"{config.name} is of the architecture '{config.model_type}', which tightfit does not know",
            f"Known: {', '.join(sorted(FAMILIES))}.",
        )
    config.text().integer("num_hidden_layers", maximum=MOST_LAYERS)  # a damaged number must not fill the memory
    spec: ModelSpec = importlib.import_module(f"{__name__}.{module}").spec(config, names)
    return spec
