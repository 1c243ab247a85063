"""Positioned reads from an open file: what is in the page cache is copied, the rest comes straight from the disk.

Reading past the page cache takes nothing from other files there, and is faster: the kernel neither looks for memory to
keep a copy in, nor copies, nor guesses how far to read ahead.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

ALIGNMENT = 4096  # bytes: what direct I/O asks of places in files and memory
SMALL = 128 << 10  # bytes: less than this is read through the page cache
REQUEST = 1 << 20  # bytes that one request asks for: a disk is busy where several threads read
DIRECT, NO_WAIT = getattr(os, "O_DIRECT", 0), getattr(os, "RWF_NOWAIT", 0)  # Linux has them


class PositionedFile:
    """A file that is open for reading; several threads may read from it. Owns ``descriptor``."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._direct: int | None = None  # opened when it is first needed; -1 where it cannot be
        self._opening = threading.Lock()
        self._own = threading.local()

    def read_some(self, position: int, view: memoryview, again: bool) -> int:
        """Fills the beginning of ``view`` with the bytes from ``position`` on; gives how many, 0 at the file's end.

        ``again`` says that the same bytes will be asked for once more: they then stay in the page cache.
        """
        if again or len(view) < SMALL or not DIRECT or not NO_WAIT:
            return os.preadv(self.descriptor, [view], position)
        request = view[:REQUEST]
        return (
            _attempt(self.descriptor, request, position, NO_WAIT)
            or self._read_directly(request, position)
            or os.preadv(self.descriptor, [request], position)
        )

    def close(self) -> None:
        os.close(self.descriptor)
        if self._direct is not None and self._direct >= 0:
            os.close(self._direct)

    def _read_directly(self, view: memoryview, position: int) -> int:
        """The same past the page cache; 0 where that does not work."""
        with self._opening:
            if self._direct is None:
                self._direct = _open_directly(self.descriptor)
        if self._direct < 0:
            return 0
        before = position % ALIGNMENT
        if not before and not _address(view) % ALIGNMENT and not len(view) % ALIGNMENT:
            return _attempt(self._direct, view, position)
        whole = -(-(before + len(view)) // ALIGNMENT) * ALIGNMENT
        aligned = self._aligned()[:whole]
        count = min(max(_attempt(self._direct, aligned, position - before) - before, 0), len(view))
        view[:count] = aligned[before : before + count]
        return count

    def _aligned(self) -> memoryview:
        """Memory of the calling thread that a request fits into, wherever it begins."""
        if not hasattr(self._own, "memory"):
            self._own.memory = memoryview(mmap.mmap(-1, REQUEST + 2 * ALIGNMENT))
        memory: memoryview = self._own.memory
        return memory


def _attempt(descriptor: int, view: memoryview, position: int, flags: int = 0) -> int:
    try:
        return os.preadv(descriptor, [view], position, flags)
    except OSError:
        return 0


def _open_directly(descriptor: int) -> int:
    """A second descriptor of the same file for direct I/O, or -1: not every file system has it."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | DIRECT)
    except OSError:
        return -1


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
