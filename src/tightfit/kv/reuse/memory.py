"""Entries of the prompt cache in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tightfit.budget.ledger import Arena
from tightfit.kv.base import Move

OBJECTS = 512  # bytes that Python's objects for an entry, or for each of its units, take at most
UNIT = 64 << 10  # bytes in which entries of several sizes are given out


def unit_of(largest: int, whole: bool) -> int:
    """Bytes in which memory is given out: entries of one size are one unit."""
    return UNIT if whole else largest


def smallest_memory(largest: int, whole: bool) -> int:
    """The smallest limit that holds one entry, whatever its size."""
    unit = unit_of(largest, whole)
    return -(-largest // unit) * (unit + OBJECTS)


@dataclass
class Entry:
    """``age`` is when it was used last: the smallest goes first."""

    units: list[int]
    age: int


class Memory:
    """``limit`` bytes of ``arena``, given out in units of ``unit`` bytes, what Python needs for them included."""

    def __init__(self, arena: Arena, limit: int, unit: int) -> None:
        count = limit // (unit + OBJECTS)
        self.unit = unit
        self.entries: dict[bytes, Entry] = {}
        self._units = arena.take(count * unit).view(count, unit)
        self._free = list(range(count - 1, -1, -1))

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return (len(self._units) - len(self._free)) * self.unit

    def touch(self, name: bytes, age: int) -> None:
        """An entry is used now, if there is one of that name."""
        if name in self.entries:
            self.entries[name].age = age

    def reader(self, name: bytes) -> Move | None:
        """What gives the bytes of an entry, part by part; None if there is none."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        pieces = self._pieces(entry.units)

        def read(part: torch.Tensor) -> None:
            for stretch, piece in pieces(part):
                stretch.copy_(piece)

        return read

    def put(self, name: bytes, nbytes: int, age: int, save: Callable[[Move], None]) -> bool:
        """Keeps what ``save`` gives, ``nbytes`` bytes, in the place of older entries. Returns whether there was
        room: what is younger stays, the beginning of the same prompt too."""
        if name in self.entries:
            self.touch(name, age)
            return True
        needed = -(-nbytes // self.unit)
        if needed > len(self._units):
            return False
        while len(self._free) < needed:
            oldest = min(self.entries, key=lambda other: self.entries[other].age)
            if self.entries[oldest].age > age:
                return False
            self._free += self.entries.pop(oldest).units
        units = [self._free.pop() for _ in range(needed)]
        pieces = self._pieces(units)

        def write(part: torch.Tensor) -> None:
            for stretch, piece in pieces(part):
                piece.copy_(stretch)

        try:
            save(write)
        except BaseException:
            self._free += units
            raise
        self.entries[name] = Entry(units, age)
        return True

    def _pieces(self, units: list[int]) -> Callable[[torch.Tensor], Iterator[tuple[torch.Tensor, torch.Tensor]]]:
        """Cuts parts that come one behind the other where units end: (stretch of the part, stretch of a unit)."""
        at = 0

        def cut(part: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            nonlocal at
            done = 0
            while done < len(part):
                unit, first = divmod(at, self.unit)
                count = min(len(part) - done, self.unit - first)
                yield part[done : done + count], self._units[units[unit], first : first + count]
                done, at = done + count, at + count

        return cut
