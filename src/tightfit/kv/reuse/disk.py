"""Entries of the prompt cache on the disk, one file for each.

A file gets its name when all of it is written, and is believed only after its checksum was verified: what is damaged,
cut off or something else is deleted and computed again. Several processes may use a folder at once; whoever writes
holds a lock, so that all of them together keep the limit.
"""

from __future__ import annotations

import fcntl
import hashlib
import heapq
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from tightfit.budget.mounts import in_memory
from tightfit.errors import UsageError
from tightfit.kv.base import Move

MAGIC = b"tightfit prompt\x01"
HEADER = struct.Struct("<16s32s32sQ")  # magic, what fixes the bits, name, bytes that follow the checksum
DIGEST = 32
OVERHEAD = HEADER.size + DIGEST
FILE = re.compile(r"[0-9a-f]{64}\.prefix")
PART = ".part"
LOCK = ".lock"
BUFFER = 256 << 10  # bytes read at once to verify
PATIENCE = 1.0  # seconds to wait for another process that writes
AT_ONCE = 64  # files that are considered for deletion in one look at the folder


@dataclass
class Reader:
    """A verified file, from which bytes are read in order."""

    file: int
    at: int

    def __call__(self, part: torch.Tensor) -> None:
        view, done = part.numpy().data, 0
        while done < len(view):
            count = os.preadv(self.file, [view[done:]], self.at)
            if count == 0:
                raise OSError("the file ended early")
            done, self.at = done + count, self.at + count


class Disk:
    """Files in ``folder`` that take at most ``limit`` bytes in all. ``root`` is what fixes the bits of entries.

    ``damaged`` counts files that could not be used, ``unwritten`` entries for which the disk had no room or that
    another process kept from being written. Raises UsageError for a folder that cannot be used.
    """

    def __init__(self, folder: Path, limit: int, root: bytes) -> None:
        self.folder = folder
        self.limit = limit
        self.root = root
        self.damaged = 0
        self.unwritten = 0
        self._buffer = memoryview(bytearray(BUFFER))
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise UsageError(
                f"{folder} cannot hold prompts: {error.strerror}", "Name another folder: --prompt-cache-dir FOLDER."
            ) from None
        if in_memory(folder):
            raise UsageError(
                f"{folder} lies in memory (tmpfs): prompts there would count twice",
                "Name a folder on a disk: --prompt-cache-dir FOLDER.",
            )

    def touch(self, name: bytes, age: int) -> None:
        """An entry is used now, if there is one of that name."""
        with suppress(OSError):
            os.utime(self._path(name), ns=(age, age))

    @contextmanager
    def reader(self, name: bytes) -> Iterator[Reader | None]:
        """What reads an entry's bytes; None if there is none that can be believed."""
        path = self._path(name)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            yield None
            return
        try:
            sound = self._verify(file, name)
            if not sound:
                self.damaged += 1
                with suppress(OSError):
                    path.unlink()
            yield Reader(file, OVERHEAD) if sound else None
        finally:
            os.close(file)

    def put(self, name: bytes, nbytes: int, age: int, save: Callable[[Move], None]) -> None:
        """Keeps what ``save`` gives, ``nbytes`` bytes, in the place of older files. A disk that is full, or in the
        hands of another process, only means that it is not kept."""
        path = self._path(name)
        if path.exists():
            self.touch(name, age)
            return
        try:
            with self._lock():
                if self._make_room(OVERHEAD + nbytes, age):
                    self._write(path, name, nbytes, age, save)
        except OSError:
            self.unwritten += 1

    def _path(self, name: bytes) -> Path:
        return self.folder / f"{name.hex()}.prefix"

    def _verify(self, file: int, name: bytes) -> bool:
        """Whether a file is whole and what its name says."""
        try:
            head = os.pread(file, OVERHEAD, 0)
            nbytes = os.fstat(file).st_size - OVERHEAD
            if nbytes < 0 or head[: HEADER.size] != HEADER.pack(MAGIC, self.root, name, nbytes):
                return False
            digest, at = _digest(head[: HEADER.size]), OVERHEAD
            while count := os.preadv(file, [self._buffer], at):
                digest.update(self._buffer[:count])
                at += count
        except OSError:
            return False
        return digest.digest() == head[HEADER.size :]

    def _write(self, path: Path, name: bytes, nbytes: int, age: int, save: Callable[[Move], None]) -> None:
        temporary = path.with_suffix(PART)
        header = HEADER.pack(MAGIC, self.root, name, nbytes)
        digest = _digest(header)
        try:
            with open(temporary, "xb", buffering=0, opener=_private) as file:
                file.seek(OVERHEAD)

                def put(part: torch.Tensor) -> None:
                    view = part.numpy().data
                    digest.update(view)
                    _write_all(file.fileno(), view)

                save(put)
                file.seek(0)
                _write_all(file.fileno(), memoryview(header + digest.digest()))
            os.utime(temporary, ns=(age, age))
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _make_room(self, nbytes: int, age: int) -> bool:
        """Deletes the oldest files, but none younger than ``age``, until ``nbytes`` more are inside the limit. Whatever
        was being written was left behind: the lock is held. Raises OSError."""
        if nbytes > self.limit:
            return False
        while True:
            total = 0

            def found() -> Iterator[tuple[int, str, int]]:
                nonlocal total
                with os.scandir(self.folder) as entries:
                    for entry in entries:
                        if entry.name.endswith(PART):
                            os.unlink(entry.path)
                        elif FILE.fullmatch(entry.name):
                            with suppress(FileNotFoundError):  # found to be damaged by another process
                                status = entry.stat(follow_symlinks=False)
                                total += status.st_size
                                yield status.st_mtime_ns, entry.path, status.st_size

            oldest = heapq.nsmallest(AT_ONCE, found())
            for used, path, size in oldest:
                if total + nbytes <= self.limit:
                    break
                if used > age:
                    return False
                with suppress(FileNotFoundError):
                    os.unlink(path)
                total -= size
            if total + nbytes <= self.limit:
                return True
            if not oldest:
                return False

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Raises OSError if another process does not let go of it."""
        file = os.open(self.folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
            yield
        finally:
            os.close(file)


def _digest(header: bytes) -> hashlib.blake2b:
    return hashlib.blake2b(header, digest_size=DIGEST)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_all(file: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += os.write(file, view[done:])
