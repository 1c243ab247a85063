"""Positioned reads from an open file: what is in the page cache is copied, the rest comes straight from the disk.

Reading past the page cache takes nothing from other files there, and is faster: the kernel neither looks for memory to
keep a copy in, nor copies, nor guesses how far to read ahead.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

from tightfit.checkpoints.descriptors import keep_open

ALIGNMENT = 4096  # bytes: what direct I/O asks of places in files and memory
SMALL = 128 << 10  # bytes: less than this is read through the page cache
REQUEST = 1 << 20  # bytes that one request asks for: a disk is busy where several threads read
DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


class PositionedFile:
    """A file that is open for reading; several threads may read from it. Owns ``descriptor``."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._direct: DirectFile | None = None  # opened when it is first needed
        self._opening = threading.Lock()

    def read_some(self, position: int, view: memoryview, again: bool) -> int:
        """Fills the beginning of ``view`` with the bytes from ``position`` on; gives how many, 0 at the file's end.

        ``again`` says that the same bytes will be asked for once more: they then stay in the page cache.
        """
        if again or len(view) < SMALL or not DIRECT:
            return os.preadv(self.descriptor, [view], position)
        with self._opening:
            if self._direct is None:
                self._direct = DirectFile(self.descriptor)
        request = view[:REQUEST]
        return self._direct.read_some(position, request) or os.preadv(self.descriptor, [request], position)

    def close(self) -> None:
        os.close(self.descriptor)
        if self._direct is not None:
            self._direct.close()


class DirectFile:
    """The same file, read past the page cache where it is not in there."""

    def __init__(self, descriptor: int) -> None:
        self._pages = CachedPages(descriptor)
        self._own = threading.local()
        try:
            self._descriptor = keep_open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | DIRECT)
        except OSError:  # not every file system has it, and not every process may open so many files
            self._descriptor = -1

    def read_some(self, position: int, view: memoryview) -> int:
        """As :meth:`PositionedFile.read_some`, for one request; 0 also where it is better read through the cache."""
        if self._descriptor < 0 or self._pages.hold(position, len(view)):
            return 0
        before = position % ALIGNMENT
        if not before and not _address(view) % ALIGNMENT and not len(view) % ALIGNMENT:
            return self._attempt(view, position)
        whole = -(-(before + len(view)) // ALIGNMENT) * ALIGNMENT
        aligned = self._memory()[:whole]
        count = min(max(self._attempt(aligned, position - before) - before, 0), len(view))
        view[:count] = aligned[before : before + count]
        return count

    def close(self) -> None:
        self._pages.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def _attempt(self, view: memoryview, position: int) -> int:
        try:
            return os.preadv(self._descriptor, [view], position)
        except OSError:  # reading through the cache will say what is wrong, or not mind
            return 0

    def _memory(self) -> memoryview:
        """Memory of the calling thread that a request fits into, wherever it begins."""
        if not hasattr(self._own, "memory"):
            self._own.memory = memoryview(mmap.mmap(-1, REQUEST + 2 * ALIGNMENT))
        memory: memoryview = self._own.memory
        return memory


class CachedPages:
    """Tells which pages of a file are in the page cache, by a mapping of it that nobody touches."""

    def __init__(self, descriptor: int) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.mmap.restype = ctypes.c_void_p
        self._nbytes = os.fstat(descriptor).st_size
        arguments = None, ctypes.c_size_t(self._nbytes), mmap.PROT_READ, mmap.MAP_SHARED, descriptor, ctypes.c_long(0)
        address = self._libc.mmap(*arguments)
        self._address: int | None = None if address == ctypes.c_void_p(-1).value else address

    def hold(self, position: int, nbytes: int) -> bool:
        """Whether all of these bytes are there."""
        if self._address is None:  # no address space is left
            return False
        start = position // mmap.PAGESIZE * mmap.PAGESIZE
        length = min(position + nbytes, self._nbytes) - start
        states = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
        if self._libc.mincore(ctypes.c_void_p(self._address + start), ctypes.c_size_t(length), states):
            return False
        return all(state & 1 for state in states.raw)

    def close(self) -> None:
        if self._address is not None:
            self._libc.munmap(ctypes.c_void_p(self._address), ctypes.c_size_t(self._nbytes))
            self._address = None


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
