"""Reads the header of a GGUF file, in a process of its own: see :mod:`tightfit.checkpoints.gguf`."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tightfit.checkpoints.files import DOWNLOAD_AGAIN
from tightfit.checkpoints.gguf.config import ROPE_FACTORS, config_of, renamed
from tightfit.checkpoints.gguf.tokenizer import tokenizer_files
from tightfit.errors import CheckpointError

# What tensors may be stored in. Those of whole numbers, and of fewer than 4 bits, are left.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "MXFP4")


class Reader(gguf.GGUFReader):
    """Takes arrays whole. The package makes several objects for each of their entries: for a vocabulary of 128,000 that
    takes 600 MiB and ten seconds."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        if raw_type != gguf.GGUFValueType.ARRAY:
            found: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return found
        of = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
        if of == gguf.GGUFValueType.STRING:
            entries = self.data[start : self._end_of_strings(start, count)]
        else:
            entries = self._get(start, self.gguf_scalar_to_np[of], count)
            if len(entries) < count:
                raise ValueError("an array ends after the file")
        return 12 + entries.nbytes, [entries], [0], [gguf.GGUFValueType.ARRAY, of]

    def _end_of_strings(self, start: int, count: int) -> int:
        content = self.data.data
        for _ in range(count):
            start += 8 + struct.unpack_from("<Q", content, start)[0]
        if start > len(content):
            raise ValueError("a text ends after the file")
        return start

    def value(self, key: str) -> Any:
        """The metadata under ``key`` as Python's types, None if there are none."""
        field = self.fields.get(key)
        if field is None or field.types[0] != gguf.GGUFValueType.ARRAY:
            return None if field is None else field.contents()
        entries = field.parts[-1]
        return _strings(entries.tobytes()) if field.types[1] == gguf.GGUFValueType.STRING else entries.tolist()


def _strings(content: bytes) -> list[str]:
    texts, start = [], 0
    while start < len(content):
        end = start + 8 + struct.unpack_from("<Q", content, start)[0]
        texts.append(content[start + 8 : end].decode())
        start = end
    return texts


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """What damaged files make numpy, the package and the readers of metadata raise becomes a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        reason = f"{path} cannot be read: {error.strerror}"
        raise CheckpointError(reason, "Check the file and its permissions.") from error
    except Exception as error:
        message = f"{path} is not a whole GGUF file: {type(error).__name__}: {error}"
        raise CheckpointError(message, DOWNLOAD_AGAIN) from error


def _open(path: str) -> Reader:
    with _reading(path):
        reader = Reader(path)
        if reader.byte_order != "I":
            raise ValueError("its numbers are in the byte order of other processors")
        return reader


def describe(asked: dict[str, Any]) -> dict[str, Any]:
    """The ``config`` of the model in the files ``paths`` of one folder, and its ``tensors``: (name, type, shape, file,
    first byte, bytes) each."""
    readers = {path: _open(path) for path in asked["paths"]}
    first = asked["paths"][0]
    metadata = readers[first].value
    shapes: dict[str, tuple[int, ...]] = {}
    found = []
    factors = None
    with _reading(first):
        _check_parts(first, metadata, len(readers))
    for path, reader in readers.items():
        for tensor in reader.tensors:
            if tensor.tensor_type.name not in TYPES:
                raise CheckpointError(
                    f"tensor '{tensor.name}' of {path} is of type {tensor.tensor_type.name}, which is not supported",
                    f"Take a file with other types: {', '.join(TYPES)}.",
                )
            if tensor.name in shapes:
                raise CheckpointError(f"tensor '{tensor.name}' is in two parts of {first}", DOWNLOAD_AGAIN)
            shapes[tensor.name] = tuple(int(size) for size in reversed(tensor.shape))
            if tensor.name == ROPE_FACTORS:
                factors = [float(factor) for factor in tensor.data]
            else:
                found.append((tensor, Path(path).name))
    with _reading(first):
        config = config_of(metadata, shapes, factors, Path(first).name)
    tensors = []
    for tensor, file in found:
        name, shape = renamed(metadata("general.architecture"), tensor.name, shapes[tensor.name], Path(first).name)
        tensors.append((name, tensor.tensor_type.name, shape, file, int(tensor.data_offset), int(tensor.n_bytes)))
    return {"config": config, "tensors": tensors}


def _check_parts(first: str, metadata: Callable[[str], Any], count: int) -> None:
    parts = metadata("split.count") or 1
    if parts != count:
        raise CheckpointError(
            f"{first} is one of {parts} parts, and {count} were found under its name",
            "Keep all parts in one folder, under the names that they were downloaded with: ...-00001-of-0000N.gguf",
        )


def write_files(asked: dict[str, Any]) -> dict[str, Any]:
    """Writes what Hugging Face keeps in small files of the model in ``paths`` to ``folder``."""
    first = asked["paths"][0]
    with _reading(first):
        texts = tokenizer_files(_open(first).value, Path(first).name)
    texts["config.json"] = json.dumps(describe(asked)["config"], indent=1)
    try:
        for name, text in texts.items():
            (Path(asked["folder"]) / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"the tokenizer of {first} cannot be written to {asked['folder']}: {error.strerror}",
            "Name a folder with room for some megabytes in the environment variable TMPDIR.",
        ) from error
    return {}
