"""Which files make up a model in GGUF, and what a process of its own reads from them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tightfit import child
from tightfit.checkpoints.safetensors_file import TensorInfo
from tightfit.errors import CheckpointError

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
HEADER = "tightfit.checkpoints.gguf.header"


def parts_of(path: Path) -> list[Path]:
    """All parts of the model that the file at ``path`` is a part of: mostly that one. Raises CheckpointError where some
    are missing."""
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    parts = [path.with_name(f"{match[1]}-{index + 1:05d}-of-{match[3]}.gguf") for index in range(count)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing or not parts:
        raise CheckpointError(
            f"{len(missing)} of {count} parts of {path} are missing: {', '.join(missing[:3])}",
            "The download was not complete: repeat it.",
        )
    return parts


def only_model(names: Collection[str], folder: Path) -> Path:
    """The first file of the one model among the ``names`` of a folder. Raises CheckpointError if there are several.

    What goes with a model to see or to hear (mmproj-*.gguf) is none.
    """
    models = sorted(name for name in names if name.endswith(".gguf") and not name.startswith("mmproj"))
    firsts = [name for name in models if not (match := PART.fullmatch(name)) or int(match[2]) == 1]
    if len(firsts) != 1:
        found = f"{len(firsts)} models: {', '.join(firsts[:5])}{', ...' * (len(firsts) > 5)}"
        raise CheckpointError(
            f"{folder} holds {found if firsts else 'no first part of a model'} in GGUF", "Give the path of one file."
        )
    return folder / firsts[0]


def describe(paths: list[Path]) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """config.json of the model in ``paths``, and its tensors under Hugging Face's names."""
    found = child.ask(f"{HEADER}:describe", {"paths": [str(path) for path in paths]})
    tensors = [TensorInfo(name, dtype, tuple(shape), *place) for name, dtype, shape, *place in found["tensors"]]
    return found["config"], {tensor.name: tensor for tensor in tensors}


@contextmanager
def small_files(paths: list[Path]) -> Iterator[Path]:
    """A folder with config.json and the tokenizer's files, for as long as they are read."""
    with tempfile.TemporaryDirectory(prefix="tightfit-") as folder:
        child.ask(f"{HEADER}:write_files", {"paths": [str(path) for path in paths], "folder": folder})
        yield Path(folder)
