"""A ring of buffers: threads fill them in a fixed cyclic order, ahead of who uses them one after the other."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a unit, which one request reads."""

    start: int
    stop: int


def pieces(nbytes: int, at_once: int) -> tuple[Piece, ...]:
    """``nbytes`` bytes in pieces of ``at_once`` at most."""
    return tuple(Piece(start, min(start + at_once, nbytes)) for start in range(0, nbytes, at_once))


@dataclass(eq=False)
class _Filling:
    """A unit in a buffer: which pieces nobody has begun to read, and how many are not read yet."""

    unit: int
    buffer: int
    waiting: deque[Piece]
    left: int
    abandoned: bool = False
    error: BaseException | None = None


Read = Callable[[int, Piece, torch.Tensor], None]  # (unit, piece, where its bytes go)


class Ring:
    """``sizes[unit]`` bytes each go through ``buffers`` in the order 0, 1, ..., and again from the start.

    Whoever uses them out of turn waits for the unit to be read; what was read ahead is given up then. An error of
    reading is raised to the user of its unit, and the next use tries again. ``used`` counts the bytes that were used,
    ``waited`` the seconds for units that were not there yet.
    """

    def __init__(self, sizes: Sequence[int], buffers: Sequence[torch.Tensor], read: Read, threads: int, at_once: int):
        self.used, self.waited = 0, 0.0
        self._sizes = sizes
        self._pieces = [pieces(size, at_once) for size in sizes]
        self._buffers = buffers
        self._read = read
        self._changed = threading.Condition()
        self._free = deque(range(len(buffers)))
        self._window: deque[_Filling] = deque()  # in the order of use
        self._next = 0  # the unit to begin with when a buffer is free
        self._round = len(sizes)
        self._stopped = False
        self._threads = [threading.Thread(target=self._fill, daemon=True) for _ in range(threads)]

    @contextmanager
    def use(self, unit: int) -> Iterator[int]:
        """The number of the buffer that holds ``unit`` meanwhile."""
        filling = self._wait_for(unit)
        try:
            yield filling.buffer
        finally:
            with self._changed:
                if self._window and self._window[0] is filling:
                    self._window.popleft()
                    self._free.append(filling.buffer)
                    self._changed.notify_all()

    def go_round(self, units: int) -> None:
        """From now on only the first ``units`` units are read ahead: after them the first one comes again."""
        with self._changed:
            self._round = units
            if self._window:
                self._next = self._after(self._window[-1].unit)

    def stop(self) -> None:
        """Ends the threads; those that read end with their request."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _wait_for(self, unit: int) -> _Filling:
        began = perf_counter()
        with self._changed:
            if self._threads and self._threads[0].ident is None:
                for thread in self._threads:
                    thread.start()
            if (self._window and self._window[0].unit != unit) or (not self._window and self._next != unit):
                self._seek(unit)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._window and not self._window[0].left)
            filling = self._window[0]
            self.waited += perf_counter() - began
            if filling.error is not None:
                self._seek(unit)
                raise filling.error
            self.used += self._sizes[unit]
            return filling

    def _seek(self, unit: int) -> None:
        """Gives up what was read ahead, to go on with ``unit``."""
        for filling in self._window:
            filling.left -= len(filling.waiting)
            filling.waiting.clear()
            filling.abandoned = True
            if not filling.left:
                self._free.append(filling.buffer)
        self._window.clear()
        self._next = unit

    def _after(self, unit: int) -> int:
        return unit + 1 if unit + 1 < self._round else 0

    def _fill(self) -> None:
        while (task := self._take()) is not None:
            filling, piece = task
            error = None
            try:
                self._read(filling.unit, piece, self._buffers[filling.buffer][piece.start : piece.stop])
            except BaseException as raised:
                error = raised
            with self._changed:
                filling.left -= 1
                filling.error = filling.error or error
                if not filling.left:
                    if filling.abandoned:
                        self._free.append(filling.buffer)
                    self._changed.notify_all()

    def _take(self) -> tuple[_Filling, Piece] | None:
        """The next piece to read; waits until there is room for one. None at the end."""
        with self._changed:
            while not self._stopped:
                for filling in self._window:
                    if filling.waiting:
                        return filling, filling.waiting.popleft()
                if self._free:
                    unit = self._next
                    waiting = deque(self._pieces[unit])
                    self._window.append(_Filling(unit, self._free.popleft(), waiting, len(waiting)))
                    self._next = self._after(unit)
                else:
                    self._changed.wait()
        return None
