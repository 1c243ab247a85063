"""The open safetensors files of one model, and positioned reads from them."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from tightfit.checkpoints.compressed import ALIGNMENT
from tightfit.checkpoints.files import DOWNLOAD_AGAIN
from tightfit.checkpoints.hub import RemoteHeader
from tightfit.checkpoints.layout import read_index
from tightfit.checkpoints.safetensors_file import Header, TensorInfo, read_header
from tightfit.errors import CheckpointError

REQUEST = 8 << 20  # bytes: large enough for the disk to be busy all the time


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
        self._descriptors: dict[str, int] = {}
        self._directly: dict[str, int | None] = {}
        self._opening = Lock()
        self._closed = False

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

    def read(self, file: str, position: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of ``file`` from ``position`` on."""
        self._read(self._descriptor(file), file, position, view)

    def read_aligned(self, file: str, position: int, view: memoryview) -> None:
        """The same for a place, a length and memory that are multiples of 4 KiB.

        What the page cache holds is copied. The rest goes past it straight into the memory, where the file system can:
        nothing is copied, and other files are not pushed out of the cache.
        """
        descriptor, direct = self._descriptor(file), self._direct(file)
        for start in range(0, len(view), REQUEST):
            request, place, done = view[start : start + REQUEST], position + start, 0
            if direct is not None:
                done = _try_to_read(descriptor, place, request, os.RWF_NOWAIT)
                done += _try_to_read(direct, place + done, request[done:])
            self._read(descriptor, file, place + done, request[done:])

    def _descriptor(self, file: str) -> int:
        if self._closed:
            raise ValueError("the checkpoint is closed")
        if file not in self._descriptors:
            raise CheckpointError(
                f"{file} was not downloaded: the model was opened by its headers only", "Open it without headers_only."
            )
        return self._descriptors[file]

    def _direct(self, file: str) -> int | None:
        """A descriptor for direct I/O, or None where there is none: it is Linux', and not of every file system."""
        with self._opening:
            if file not in self._directly:
                try:
                    self._directly[file] = os.open(self._folder / file, os.O_RDONLY | os.O_DIRECT)
                except (AttributeError, OSError):
                    self._directly[file] = None
            return self._directly[file]

    def _read(self, descriptor: int, file: str, position: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], position + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self._folder / file} cannot be read at byte {position + done}: {error.strerror}",
                    "Check the disk, then download the file again.",
                ) from error
            if count == 0:
                found = os.fstat(self._descriptors[file]).st_size
                raise CheckpointError(
                    f"{self._folder / file} shrank while in use: expected {self.sizes[file]} bytes, found {found}",
                    DOWNLOAD_AGAIN,
                )
            done += count

    def close(self) -> None:
        self._closed = True
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        while self._directly:
            descriptor = self._directly.popitem()[1]
            if descriptor is not None:
                os.close(descriptor)

    def _is_there(self, file: str) -> bool:
        return file in self._remote or (self._folder / file).exists()

    def _open(self, file: str) -> dict[str, TensorInfo]:
        if file in self._remote:
            header = self._remote[file]
            self.sizes[file] = header.size
            return self._take(file, read_header(io.BytesIO(header.content), header.size, file, f"{file} on the hub"))
        path = self._folder / file
        try:
            # A pipe would block the open, so look before.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise CheckpointError(f"{path} is not a regular file", DOWNLOAD_AGAIN)
            descriptor = self._descriptors[file] = os.open(path, os.O_RDONLY)
            size = self.sizes[file] = os.fstat(descriptor).st_size
            with open(descriptor, "rb", closefd=False) as stream:
                return self._take(file, read_header(stream, size, file, str(path)))
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read: {error.strerror}", "Check the file and its permissions."
            ) from error

    def _take(self, file: str, header: Header) -> dict[str, TensorInfo]:
        self.metadata[file] = header.metadata
        return header.tensors


def _try_to_read(descriptor: int, position: int, view: memoryview, flags: int = 0) -> int:
    """How many bytes one request brought, a multiple of 4 KiB; none where it failed."""
    try:
        return os.preadv(descriptor, [view], position, flags) // ALIGNMENT * ALIGNMENT
    except OSError:
        return 0
