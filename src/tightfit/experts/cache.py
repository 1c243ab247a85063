"""A cache of experts: threads read those that are wanted now, and then those that are expected, into slots."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TypeAlias

import numpy as np
import torch

from tightfit.experts.policy import Ranking
from tightfit.weights.placement.readers import Filling, Piece, Readers

Key: TypeAlias = tuple[int, int]  # (mixture, expert)
Read = Callable[[Key, Piece, torch.Tensor], None]


@dataclass(eq=False)
class _Held(Filling):
    """An expert in a slot."""

    key: Key = (0, 0)
    in_use: bool = False


class ExpertCache(Readers):
    """Experts in ``slots``, those that ``ranking`` says are worth most; those of mixture i are read in ``pieces[i]``.

    A step says what it wants of a mixture (:meth:`want`), then uses each of that; meanwhile it may say what it expects
    to want of the next one (:meth:`expect`). What is wanted is read first, in its order. Where room is needed, first
    those go that nobody wants, for one that is wanted also those that are expected, and for one that is waited for,
    the wanted one whose turn comes last.

    ``counts``: ``used`` experts, of which ``hits`` were there when they were wanted and ``late`` ones were being read;
    ``foreseen``: those that had been expected; ``read``: bytes.
    """

    def __init__(
        self,
        slots: Sequence[torch.Tensor],
        pieces: Sequence[Sequence[Piece]],
        read: Read,
        ranking: Ranking,
        threads: int,
    ) -> None:
        super().__init__(slots, threads)
        self.counts: Counter[str] = Counter()
        self._pieces = pieces
        self._sizes = [sum(piece.stop - piece.start for piece in each) for each in pieces]
        self._read_key = read
        self._ranking = ranking
        self._free = deque(range(len(slots)))
        self._held: dict[Key, _Held] = {}
        self._wanted: dict[Key, None] = {}  # not used yet, in the order of use
        self._awaited: Key | None = None
        self._expected: deque[Key] = deque()  # for which there was no room yet
        self._foreseen: set[Key] = set()
        self._reading: list[_Held] = []
        # Of each slot: the mixture and the expert in it, whether that must stay, and whether it is expected.
        self._layers, self._experts = np.zeros(len(slots), np.int64), np.zeros(len(slots), np.int64)
        self._busy, self._ahead = np.zeros(len(slots), bool), np.zeros(len(slots), bool)

    def want(self, layer: int, experts: Sequence[int], scores: torch.Tensor) -> None:
        """A step will use ``experts`` of mixture ``layer``, in this order. ``scores`` is as in
        :meth:`~tightfit.experts.policy.Ranking.used`."""
        keys = [(layer, expert) for expert in experts]
        with self._changed:
            self._ranking.used(layer, list(experts), scores)
            self._ahead &= self._layers != layer
            self._expected.clear()
            self._count(keys)
            self._set_wanted(keys)

    def expect(self, layer: int, experts: Iterable[int]) -> None:
        """A step will probably want ``experts`` of mixture ``layer``: they are read if there is room and time."""
        with self._changed:
            self._foreseen = {(layer, expert) for expert in experts}
            self._expected = deque(sorted(self._foreseen - self._held.keys()))
            for key in self._foreseen & self._held.keys():
                self._ahead[self._held[key].buffer] = True
            self._wake()

    @contextmanager
    def use(self, key: Key) -> Iterator[int]:
        """The number of the slot that holds the expert meanwhile. Raises the error of reading it."""
        began = perf_counter()
        with self._changed:
            self._start()
            if key not in self._wanted:
                self._set_wanted([key])
            held = self._held.get(key)
            if held is None or held.left:
                self._awaited = key
                self._wake()
                try:
                    self._changed.wait_for(lambda: key in self._held and not self._held[key].left)
                finally:
                    self._awaited = None
            self.waited += perf_counter() - began
            held = self._held[key]
            if held.error is not None:
                self._drop(held)
                raise held.error
            held.in_use = True
        try:
            yield held.buffer
        finally:
            with self._changed:
                held.in_use = False
                self._wanted.pop(key, None)
                self._settle(held)
                self._wake()

    def fill(self, keys: Iterable[Key]) -> Iterator[int]:
        """Reads experts into free slots; gives the bytes of each when it is there. Raises the error of reading one."""
        keys = list(keys)
        with self._changed:
            self._set_wanted(keys)
        for key in keys:
            with self.use(key):
                yield self._sizes[key[0]]

    def _count(self, keys: list[Key]) -> None:
        self.counts["used"] += len(keys)
        for key in keys:
            held = self._held.get(key)
            self.counts["foreseen"] += key in self._foreseen
            if held is not None and held.error is None:
                self.counts["late" if held.left else "hits"] += 1

    def _set_wanted(self, keys: list[Key]) -> None:
        before, self._wanted = self._wanted, dict.fromkeys(keys)
        for key in (*before, *keys):
            held = self._held.get(key)
            if held is not None:
                self._settle(held)
                if held.error is not None and not held.left:
                    self._drop(held)
        self._wake()

    def _wake(self) -> None:
        """Wakes the threads if there is something to read for which there may be room now."""
        if self._expected or any(key not in self._held for key in self._wanted):
            self._work.notify_all()

    def _settle(self, held: _Held) -> None:
        """Notes whether an expert must stay."""
        self._busy[held.buffer] = bool(held.left or held.in_use or held.key in self._wanted)

    def _next(self) -> Filling | None:
        while (held := self._begin()) is not None:
            self._reading.append(held)
        waiting = [held for held in self._reading if held.waiting]
        return next((held for held in waiting if held.key in self._wanted), waiting[0] if waiting else None)

    def _begin(self) -> _Held | None:
        """The next expert to read, in the slot that it gets; None if there is none, or no room."""
        first = () if self._awaited is None else (self._awaited,)
        key = next((key for key in (*first, *self._wanted) if key not in self._held), None)
        if key is not None:
            return self._hold(key, expected=False)
        while self._expected and self._expected[0] in self._held:
            self._expected.popleft()
        held = self._hold(self._expected[0], expected=True) if self._expected else None
        if held is not None:
            self._expected.popleft()
        return held

    def _hold(self, key: Key, expected: bool) -> _Held | None:
        if not self._free:
            victim = self._victim(key, expected)
            if victim is None:
                return None
            self._drop(self._held[victim])
        waiting = deque(self._pieces[key[0]])
        held = self._held[key] = _Held(self._free.popleft(), waiting, len(waiting), key=key)
        slot = held.buffer
        (self._layers[slot], self._experts[slot]), self._ahead[slot] = key, expected
        self._settle(held)
        self.counts["read"] += self._sizes[key[0]]
        return held

    def _victim(self, wanted: Key, for_expected: bool) -> Key | None:
        """Who gives up its slot for ``wanted``."""
        candidates = np.flatnonzero(~self._busy & ~self._ahead)
        if not len(candidates) and not for_expected:
            candidates = np.flatnonzero(~self._busy)
        if not len(candidates):
            held = [self._held[key] for key in self._wanted if key in self._held and wanted == self._awaited]
            return next((each.key for each in reversed(held) if not (each.left or each.in_use)), None)
        layers, experts = self._layers[candidates], self._experts[candidates]
        least = int(self._ranking.worth.numpy()[layers, experts].argmin())
        return int(layers[least]), int(experts[least])

    def _drop(self, held: _Held) -> None:
        del self._held[held.key]
        self._free.append(held.buffer)

    def _read(self, filling: Filling, piece: Piece, out: torch.Tensor) -> None:
        assert isinstance(filling, _Held)
        self._read_key(filling.key, piece, out)

    def _done(self, filling: Filling) -> None:
        assert isinstance(filling, _Held)
        self._reading.remove(filling)
        self._settle(filling)
