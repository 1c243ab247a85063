"""Files that are read from the disk, whatever of them is in memory."""

from __future__ import annotations

import mmap
import os
import threading
import time
from pathlib import Path

from tightfit.checkpoints.positioned import ALIGNMENT, DIRECT, REQUEST
from tightfit.errors import UsageError

IN_ORDER = 0.15  # seconds of reading in order


class Cold:
    """A file that is read past the page cache where its file system can; from the start again behind its end."""

    def __init__(self, file: Path) -> None:
        self._own = threading.local()
        try:
            self._descriptor = os.open(file, os.O_RDONLY | DIRECT)
        except OSError:  # not every file system has direct reads
            self._descriptor = os.open(file, os.O_RDONLY)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._nbytes = os.fstat(self._descriptor).st_size // ALIGNMENT * ALIGNMENT

    def __enter__(self) -> Cold:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def read(self, position: int, view: memoryview) -> None:
        """Fills ``view`` as :class:`tightfit.checkpoints.positioned.DirectFile` does: in requests of a mebibyte, and
        through memory of its own where ``position`` is no multiple of 4 KiB."""
        done = 0
        while done < len(view):
            want = min(REQUEST, len(view) - done)
            at = (position + done) % max(self._nbytes - REQUEST - ALIGNMENT, ALIGNMENT)
            before = (position + done) % ALIGNMENT
            at -= at % ALIGNMENT
            if not before:
                got = os.preadv(self._descriptor, [view[done : done + want]], at)
            else:
                own = self._memory()
                got = min(os.preadv(self._descriptor, [own], at) - before, want)
                view[done : done + got] = own[before : before + got]
            if got <= 0:
                raise UsageError("the file is too small to measure a disk with", "Name a larger one.")
            done += got

    def in_order(self, block: int) -> float:
        """Bytes per second of one thread that reads blocks in order, for a fifth of a second."""
        with mmap.mmap(-1, block) as memory:
            memory.write(bytes(block))
            done, began = 0, time.perf_counter()
            while (took := time.perf_counter() - began) < IN_ORDER:
                done += os.preadv(self._descriptor, [memory], done % max(self._nbytes - block, ALIGNMENT))
            return done / took

    def _memory(self) -> memoryview:
        if not hasattr(self._own, "memory"):
            self._own.memory = memoryview(mmap.mmap(-1, REQUEST + ALIGNMENT))
        memory: memoryview = self._own.memory
        return memory
