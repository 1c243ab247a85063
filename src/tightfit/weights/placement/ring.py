"""A ring of buffers: threads fill them in a fixed cyclic order, ahead of who uses them one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch

from tightfit.weights.placement.readers import Filling, Piece, Readers, pieces


@dataclass(eq=False)
class _Unit(Filling):
    """A unit in a buffer; ``abandoned`` when it is no longer wanted."""

    unit: int = 0
    abandoned: bool = False


Read = Callable[[int, Piece, torch.Tensor], None]  # (unit, piece, where its bytes go)


class Ring(Readers):
    """``sizes[unit]`` bytes each go through ``buffers`` in the order 0, 1, ..., and again from the start.

    Whoever uses them out of turn waits for the unit to be read; what was read ahead is given up then. An error of
    reading is raised to the user of its unit, and the next use tries again. ``used`` counts the bytes that were used.
    """

    def __init__(self, sizes: Sequence[int], buffers: Sequence[torch.Tensor], read: Read, threads: int, at_once: int):
        super().__init__(buffers, threads)
        self.used = 0
        self._sizes = sizes
        self._pieces = [pieces(size, at_once) for size in sizes]
        self._read_unit = read
        self._free = deque(range(len(buffers)))
        self._window: deque[_Unit] = deque()  # in the order of use
        self._following = 0  # the unit to begin with when a buffer is free
        self._round = len(sizes)

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
                    self._work.notify_all()

    def go_round(self, units: int) -> None:
        """From now on only the first ``units`` units are read ahead: after them the first one comes again."""
        with self._changed:
            self._round = units
            if self._window:
                self._following = self._after(self._window[-1].unit)

    def _wait_for(self, unit: int) -> _Unit:
        began = perf_counter()
        with self._changed:
            self._start()
            if (self._window and self._window[0].unit != unit) or (not self._window and self._following != unit):
                self._seek(unit)
            self._work.notify_all()
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
        self._following = unit

    def _after(self, unit: int) -> int:
        return unit + 1 if unit + 1 < self._round else 0

    def _next(self) -> Filling | None:
        for filling in self._window:
            if filling.waiting:
                return filling
        if not self._free:
            return None
        unit = self._following
        self._following = self._after(unit)
        waiting = deque(self._pieces[unit])
        self._window.append(_Unit(self._free.popleft(), waiting, len(waiting), unit=unit))
        return self._window[-1]

    def _read(self, filling: Filling, piece: Piece, out: torch.Tensor) -> None:
        assert isinstance(filling, _Unit)
        self._read_unit(filling.unit, piece, out)

    def _done(self, filling: Filling) -> None:
        assert isinstance(filling, _Unit)
        if filling.abandoned:
            self._free.append(filling.buffer)
