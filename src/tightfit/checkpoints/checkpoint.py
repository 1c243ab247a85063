"""A checkpoint: its configuration, its tensors and where their bytes lie, and reading those into given memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tightfit.checkpoints import layout
from tightfit.checkpoints.compressed import Compressed, read_compressed
from tightfit.checkpoints.files import read_json
from tightfit.checkpoints.generation import GenerationDefaults, read_generation_defaults
from tightfit.checkpoints.gguf import opening as gguf
from tightfit.checkpoints.hub import RemoteHeader, fetch
from tightfit.checkpoints.quantization import Quantization, read_quantization
from tightfit.checkpoints.safetensors_file import DTYPE_BITS, TensorInfo
from tightfit.checkpoints.tensor_files import TensorFiles
from tightfit.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from tightfit.checkpoints.tokenizer import Tokenizer

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


class Checkpoint:
    """An open model. Made by :func:`open_checkpoint`; close it, or use it in a ``with`` statement.

    ``name``: the hub name, or the folder's or file's own name; ``config``: config.json as it is, or as it would be;
    ``tensors``: by name; ``quantization``: how the stored weights are quantised, None for plain ones; ``compressed``:
    how a folder of `tightfit compress` was made, None for others; ``generation``: recommended sampling and end tokens.
    """

    def __init__(
        self, name: str, path: Path, config: dict[str, Any], weights: TensorFiles, gguf_parts: list[Path] | None = None
    ) -> None:
        self.name = name
        self.config = config
        self._path, self._gguf_parts = path, gguf_parts
        self.tensors: dict[str, TensorInfo] = weights.tensors
        self.compressed: Compressed | None = None
        self.quantization: Quantization | None = None
        if layout.COMPRESSED in weights.metadata:
            self.compressed = read_compressed(weights.metadata[layout.COMPRESSED], self.tensors, name)
        else:
            self.quantization = read_quantization(config, self.tensors, name)
        recommended = None if gguf_parts else path / "generation_config.json"
        self.generation: GenerationDefaults = read_generation_defaults(recommended, config, name)
        self._weights = weights

    @property
    def is_gguf(self) -> bool:
        return self._gguf_parts is not None

    @property
    def holds_blocks(self) -> bool:
        """Whether there are tensors in the quantised types of GGUF."""
        return any(tensor.dtype not in DTYPE_BITS for tensor in self.tensors.values())

    @property
    def largest_file(self) -> Path | None:
        """Of the files with the weights; None where only headers were fetched."""
        return max(self._weights.paths, key=lambda path: self._weights.sizes[path.name], default=None)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the configuration, the tensors' names, types and shapes, the sizes of the files, and how a
        compressed folder was made.

        The same for a folder, a cached model and a model of which only the headers were read.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.name):
            digest.update(json.dumps([tensor.name, tensor.dtype, tensor.shape]).encode())
        digest.update(json.dumps(self._weights.sizes, sort_keys=True).encode())
        if self.compressed is not None:
            digest.update(json.dumps(self.compressed.metadata(), sort_keys=True).encode())
        return digest.hexdigest()

    def read_into(self, info: TensorInfo, start_byte: int, buffer: WriteableBuffer, again: bool = False) -> None:
        """Fill ``buffer`` (writable, contiguous) with the bytes of a tensor from ``start_byte`` on.

        What is not in the page cache is read past it where the file system can, unless the same bytes will be asked for
        ``again``. May be called from several threads. Raises CheckpointError where the file cannot be read or has
        shrunk, ValueError where the range lies outside the tensor.
        """
        view = memoryview(buffer).cast("B")
        if not 0 <= start_byte <= info.nbytes - len(view):
            raise ValueError(f"bytes [{start_byte}, {start_byte + len(view)}) of '{info.name}' ({info.nbytes} bytes)")
        self._weights.read(info.file, info.offset + start_byte, view, again)

    @contextmanager
    def small_files(self) -> Iterator[Path]:
        """A folder with everything but the weights: the model's own, or one that is there meanwhile."""
        if self._gguf_parts is None:
            yield self._path
            return
        with gguf.small_files(self._gguf_parts) as folder:
            yield folder

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read on the first call. Raises CheckpointError where there is none that can be used."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from tightfit.checkpoints.tokenizer import Tokenizer

        with self.small_files() as folder:
            return Tokenizer(folder, self.name)

    def close(self) -> None:
        """Close the files. The tensors' descriptions stay valid."""
        self._weights.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(name_or_path: str, revision: str | None = None, *, headers_only: bool = False) -> Checkpoint:
    """Open a folder, a GGUF file, or a model of the hub by name (``org/name``), which is downloaded unless it is
    cached.

    ``revision`` is a branch, tag or commit of the hub. With ``headers_only`` the weights of a hub model are not
    downloaded: everything but :meth:`Checkpoint.read_into` works.
    Raises CheckpointError, naming the file, for whatever is missing, truncated, inconsistent or not supported.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UsageError(f"'{name_or_path}' is a folder and has no revisions", "Leave the revision out.")
        names = os.listdir(path)
        if layout.is_gguf(names):
            return _open_gguf(gguf.only_model(names, path))
        return _open_folder(path, path.resolve().name, {})
    if path.is_file() and path.suffix == ".gguf":
        return _open_gguf(path)
    if path.exists():
        layout.refuse_file(path)
    if not HUB_NAME.fullmatch(name_or_path):
        raise CheckpointError(
            f"there is no folder or file '{name_or_path}'",
            "Give a model's folder, a GGUF file, or a name of the hub such as org/model.",
        )
    snapshot = fetch(name_or_path, revision, headers_only)
    try:
        return _open_folder(snapshot.path, name_or_path, snapshot.headers)
    except CheckpointError as error:
        if not snapshot.unreachable:
            raise
        reason = f"Only the cache was searched ({snapshot.unreachable})."
        raise CheckpointError(error.message, f"{reason} {error.hint}") from error


def _open_folder(path: Path, name: str, remote: Mapping[str, RemoteHeader]) -> Checkpoint:
    names = set(os.listdir(path)) | remote.keys()
    if layout.CONFIG not in names:
        layout.refuse_folder(names, str(path))
    config = read_json(path / layout.CONFIG)
    weights = TensorFiles(path, remote)
    files = layout.weight_files(names, str(path))
    try:
        if files == [layout.INDEX]:
            weights.open_index(path / layout.INDEX)
        else:
            weights.open_all(files)
        return Checkpoint(name, path, config, weights)
    except BaseException as error:
        weights.close()
        if isinstance(error, CheckpointError) and files == [layout.COMPRESSED]:
            hint = error.hint.replace("download it again", "compress the model again")
            raise CheckpointError(error.message, hint) from error
        raise


def _open_gguf(path: Path) -> Checkpoint:
    parts = gguf.parts_of(path)
    config, tensors = gguf.describe(parts)
    weights = TensorFiles(path.parent, {})
    try:
        weights.open_described([part.name for part in parts], tensors)
        return Checkpoint(path.name, path.parent, config, weights, parts)
    except BaseException:
        weights.close()
        raise
