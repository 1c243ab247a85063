"""Small checkpoints of given tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tightfit.checkpoints.checkpoint import Checkpoint, open_checkpoint

Write = Callable[..., Checkpoint]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Saves tensors with a ``quantization_config`` and opens them."""

    def write(tensors: dict[str, torch.Tensor], **quantization: Any) -> Checkpoint:
        save_file(tensors, tmp_path / "model.safetensors")
        config = {"model_type": "llama"} | ({"quantization_config": quantization} if quantization else {})
        (tmp_path / "config.json").write_text(json.dumps(config))
        return open_checkpoint(str(tmp_path))

    return write
