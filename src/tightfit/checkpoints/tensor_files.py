"""The open files of one model, safetensors or GGUF, and positioned reads from them."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tightfit.checkpoints import descriptors
from tightfit.checkpoints.files import DOWNLOAD_AGAIN
from tightfit.checkpoints.hub import RemoteHeader
from tightfit.checkpoints.layout import read_index
from tightfit.checkpoints.positioned import PositionedFile
from tightfit.checkpoints.safetensors_file import Header, TensorInfo, read_header
from tightfit.errors import CheckpointError


class TensorFiles:
    """``tensors`` by name, and of their files ``sizes`` in bytes and the ``metadata`` of their headers. Each file is
    opened once and stays open.

    A file that is not in the ``folder`` but among the ``remote`` headers contributes its tensors and cannot be read.
    """

    def __init__(self, folder: Path, remote: Mapping[str, RemoteHeader]) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self.sizes: dict[str, int] = {}
        self.metadata: dict[str, dict[str, Any]] = {}
        self._folder = folder
        self._remote = remote
        self._files: dict[str, PositionedFile] = {}
        self._closed = False

    @property
    def paths(self) -> list[Path]:
        """The files that are here."""
        return [self._folder / name for name in self._files]

    def open_all(self, files: list[str]) -> None:
        """Take all tensors of ``files``."""
        for file in files:
            for name, tensor in self._open(file).items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"tensor '{name}' is in both {self.tensors[name].file} and {file} of {self._folder}",
                        "Keep the files of one model in a folder.",
                    )
                self.tensors[name] = tensor

    def open_index(self, path: Path) -> None:
        """Take the tensors that the index at ``path`` lists, each from the file where it says they are."""
        weight_map = read_index(path)
        missing = {file for file in weight_map.values() if not self._is_there(file)}
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(set(weight_map.values()))} weight files of {self._folder} are missing: "
                f"{', '.join(sorted(missing)[:3])}{', ...' * (len(missing) > 3)}",
                "The download was not complete: repeat it.",
            )
        contents = {file: self._open(file) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in contents[file]:
                raise CheckpointError(
                    f"{path} places tensor '{name}' in {file}, which does not hold it",
                    "The files belong to different versions of the model: download them again.",
                )
            self.tensors[name] = contents[file][name]

    def open_described(self, files: list[str], tensors: Mapping[str, TensorInfo]) -> None:
        """Take ``tensors``, whose places in ``files`` are known."""
        for file in files:
            self._open_file(file)
        for tensor in tensors.values():
            if tensor.offset + tensor.nbytes > self.sizes[tensor.file]:
                path = self._folder / tensor.file
                raise CheckpointError(f"{path} is truncated: tensor '{tensor.name}' ends after it", DOWNLOAD_AGAIN)
        self.tensors.update(tensors)

    def read(self, file: str, position: int, view: memoryview, again: bool) -> None:
        """Fill ``view`` with the bytes of ``file`` from ``position`` on, which will be read ``again`` or not."""
        if self._closed:
            raise ValueError("the checkpoint is closed")
        if file not in self._files:
            raise CheckpointError(
                f"{file} was not downloaded: the model was opened by its headers only", "Open it without headers_only."
            )
        done = 0
        while done < len(view):
            try:
                count = self._files[file].read_some(position + done, view[done:], again)
            except OSError as error:
                raise CheckpointError(
                    f"{self._folder / file} cannot be read at byte {position + done}: {error.strerror}",
                    "Check the disk, then download the file again.",
                ) from error
            if count == 0:
                found = os.fstat(self._files[file].descriptor).st_size
                raise CheckpointError(
                    f"{self._folder / file} shrank while in use: expected {self.sizes[file]} bytes, found {found}",
                    DOWNLOAD_AGAIN,
                )
            done += count

    def close(self) -> None:
        self._closed = True
        while self._files:
            self._files.popitem()[1].close()

    def _is_there(self, file: str) -> bool:
        return file in self._remote or (self._folder / file).exists()

    def _open(self, file: str) -> dict[str, TensorInfo]:
        if file in self._remote:
            header = self._remote[file]
            self.sizes[file] = header.size
            return self._take(file, read_header(io.BytesIO(header.content), header.size, file, f"{file} on the hub"))
        path, descriptor = self._folder / file, self._open_file(file)
        try:
            with open(descriptor, "rb", closefd=False) as stream:
                return self._take(file, read_header(stream, self.sizes[file], file, str(path)))
        except OSError as error:
            raise _unreadable(path, error) from error

    def _open_file(self, file: str) -> int:
        """The descriptor of ``file``, which is open from now on."""
        path = self._folder / file
        try:
            # A pipe would block the open, so look before.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise CheckpointError(f"{path} is not a regular file", DOWNLOAD_AGAIN)
            descriptor = descriptors.keep_open(path, os.O_RDONLY)
            self._files[file] = PositionedFile(descriptor)
            self.sizes[file] = os.fstat(descriptor).st_size
        except OSError as error:
            raise _unreadable(path, error) from error
        return descriptor

    def _take(self, file: str, header: Header) -> dict[str, TensorInfo]:
        self.metadata[file] = header.metadata
        return header.tensors


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if error.errno == errno.EMFILE:
        return CheckpointError(
            f"{path} is one weight file too many: this process may have {descriptors.limit()} files open",
            "Let it have more (ulimit -n 1024, where ulimit -Hn allows that).",
        )
    return CheckpointError(f"{path} cannot be read: {error.strerror}", "Check the file and its permissions.")
