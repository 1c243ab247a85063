"""Reading the small text files of a checkpoint, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tightfit.errors import CheckpointError

# The largest real one, the index of a mixture of 90,000 tensors, has 9 MB; parsing takes about ten times the size.
MAX_TEXT_BYTES = 64 << 20
DOWNLOAD_AGAIN = "The file is damaged or incomplete: download it again."


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises CheckpointError where it is missing, too large, or not text."""
    return _decode(_read(path), path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError where it is missing, too large, or not a JSON object."""
    text = _decode(_read(path), path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", DOWNLOAD_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {_kind(value)}, expected a JSON object", DOWNLOAD_AGAIN)
    return value


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing", "Download the model again, or point to its folder.")
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}", "Check the file and its permissions."
        ) from error
    if len(content) > MAX_TEXT_BYTES:
        raise CheckpointError(
            f"{path} is larger than {MAX_TEXT_BYTES >> 20} MiB, which no such file is", DOWNLOAD_AGAIN
        )
    return content


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}", DOWNLOAD_AGAIN) from error


def _kind(value: object) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), f"a {type(value).__name__}")
