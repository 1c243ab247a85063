"""Threads that fill buffers with what is needed next, piece by piece, while others compute."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

PIECE = 4 << 20  # bytes that a thread reads before it takes the next
READERS = 4  # threads: what keeps a disk busy


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a buffer, which a thread reads before it takes the next."""

    start: int
    stop: int


def pieces(nbytes: int, at_once: int = PIECE, start: int = 0) -> list[Piece]:
    """``nbytes`` bytes from ``start`` on, in pieces of ``at_once`` at most."""
    end = start + nbytes
    return [Piece(begin, min(begin + at_once, end)) for begin in range(start, end, at_once)]


@dataclass(eq=False)
class Filling:
    """A buffer that is being filled, or full: the pieces that nobody has begun to read, how many are not read yet, and
    the error of one."""

    buffer: int
    waiting: deque[Piece]
    left: int
    error: BaseException | None = None


class Readers(ABC):
    """``threads`` threads that read what :meth:`_next` says.

    All state of a subclass is guarded by one lock. It notifies ``_work`` when there may be something to read, and is
    notified through ``_changed`` when something was read: waking threads for nothing would take more of a core than
    reading does.
    """

    def __init__(self, buffers: Sequence[torch.Tensor], threads: int) -> None:
        self.waited = 0.0  # seconds, for what was not there yet
        self._buffers = buffers
        lock = threading.Lock()
        self._changed, self._work = threading.Condition(lock), threading.Condition(lock)
        self._stopped = False
        self._threads = [threading.Thread(target=self._fill, daemon=True) for _ in range(threads)]

    def stop(self) -> None:
        """Ends the threads; those that read end with their request."""
        with self._changed:
            self._stopped = True
            self._work.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    @abstractmethod
    def _next(self) -> Filling | None:
        """A filling of which a piece waits to be read, if there is room for one. The caller holds the lock."""

    @abstractmethod
    def _read(self, filling: Filling, piece: Piece, out: torch.Tensor) -> None:
        """Reads a piece to ``out``. The caller does not hold the lock."""

    @abstractmethod
    def _done(self, filling: Filling) -> None:
        """Told when the last piece of a filling that somebody began was read. The caller holds the lock."""

    def _start(self) -> None:
        """Starts the threads, the first time."""
        if self._threads and self._threads[0].ident is None:
            for thread in self._threads:
                thread.start()

    def _fill(self) -> None:
        while (task := self._take()) is not None:
            filling, piece = task
            error = None
            try:
                self._read(filling, piece, self._buffers[filling.buffer][piece.start : piece.stop])
            except BaseException as raised:
                error = raised
            with self._changed:
                filling.left -= 1
                filling.error = filling.error or error
                if not filling.left:
                    self._done(filling)
                    self._changed.notify_all()

    def _take(self) -> tuple[Filling, Piece] | None:
        """The next piece to read; waits until there is one. None at the end."""
        with self._changed:
            while not self._stopped:
                filling = self._next()
                if filling is not None:
                    return filling, filling.waiting.popleft()
                self._work.wait()
        return None
