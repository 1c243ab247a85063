"""Which files of a folder or a hub repository make up a model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

from tightfit.checkpoints.files import DOWNLOAD_AGAIN, read_json
from tightfit.errors import CheckpointError

CONFIG = "config.json"
COMPRESSED = "tightfit.safetensors"  # a name of its own: no other program can use it
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Everything but the weights, as patterns of huggingface_hub.
SMALL_FILES = (
    CONFIG,
    INDEX,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
SUPPORTED = (
    "Models open from safetensors, a Hugging Face folder or hub name with config.json and *.safetensors, or from GGUF, "
    "a file or a folder with one."
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def is_gguf(names: Collection[str]) -> bool:
    """Whether a folder with the files ``names`` holds GGUF and no safetensors."""
    return any(name.endswith(".gguf") for name in names) and not any(name.endswith(".safetensors") for name in names)


def weight_files(names: Collection[str], where: str) -> list[str]:
    """The files that hold the weights among the file ``names`` of a folder: what `tightfit compress` wrote, or as
    transformers looks for them the single file, the index, or all ``*.safetensors``. Raises CheckpointError, naming
    what there is instead.
    """
    for name in (COMPRESSED, SINGLE, INDEX):
        if name in names:
            return [name]
    shards = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if not shards:
        refuse_weights(names, where)
    return shards


def refuse_weights(names: Collection[str], where: str) -> NoReturn:
    """Raise the CheckpointError that fits a folder without safetensors, or a single file."""
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    pickles = sorted(name for name in names if name.endswith(PICKLES) and name != "training_args.bin")
    if gguf:
        raise CheckpointError(
            f"{where} holds GGUF ({gguf[0]}), which opens from a file only",
            f"Download the file and give its path: hf download {where} {gguf[0]} --local-dir FOLDER",
        )
    if pickles:
        raise CheckpointError(
            f"{where} holds pickled weights only ({pickles[0]}), and a pickle can execute code: it is not opened",
            "Look for a revision with safetensors, or convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(FOLDER) of transformers.",
        )
    raise CheckpointError(f"{where} holds no *.safetensors", SUPPORTED)


def refuse_folder(names: Collection[str], where: str) -> NoReturn:
    """Raise the CheckpointError that fits a folder without config.json."""
    if "adapter_config.json" in names:
        raise CheckpointError(f"{where} holds an adapter, not a model: it has no {CONFIG}", "Give its base model.")
    if not any(name.endswith(".safetensors") for name in names):
        refuse_weights(names, where)
    raise CheckpointError(f"{where} has no {CONFIG}", SUPPORTED)


def refuse_file(path: Path) -> NoReturn:
    """Raise the CheckpointError that fits a path to something that is not a folder."""
    if path.suffix in PICKLES:
        refuse_weights([path.name], str(path.parent))
    raise CheckpointError(f"{path} is not a folder", f"Give the folder that holds the model: {path.parent}")


def read_index(path: Path) -> dict[str, str]:
    """The ``weight_map`` of an index: tensor name to file name. Raises CheckpointError where it is malformed."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no 'weight_map'", DOWNLOAD_AGAIN)
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or "/" in file or "\\" in file:
            raise CheckpointError(
                f"{path} places tensor '{tensor}' in {file!r}, expected a *.safetensors file of the same folder",
                DOWNLOAD_AGAIN,
            )
    return weight_map
