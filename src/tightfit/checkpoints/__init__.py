"""Opening models: folders and hub names, safetensors, GGUF, config.json, tokenizer and chat template.

Nothing here imports torch or numpy (headers of GGUF are read in another process), nothing in a checkpoint is executed,
and no pickle is opened.
"""

from tightfit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoints.safetensors_file import TensorInfo

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]
