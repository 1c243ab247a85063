"""The prompt cache: beginnings of prompts are kept and found again, in memory and on the disk.

A prompt is cut into blocks of one chunk, the unit in which prompts are computed: chunks lie at fixed positions, so that
what is found has the bits that computing it again would give. The name of a block is a hash of the name of the block
before it and its own tokens, and the first follows from everything that fixes the bits. So a name stands for all that
came before, and equal names for equal contents.

A cache that keeps everything saves what each block added, and any number of blocks from the start can be found. One
that lets go of tokens, merges or codes them saves all of a sequence, at the end of its prompt's last whole chunk.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tightfit.kv.base import BaseCache
from tightfit.kv.reuse.disk import Disk
from tightfit.kv.reuse.memory import Memory

NAME = 32  # bytes


@dataclass
class Prefix:
    """The whole blocks of one prompt. What is in the cache of its first ``done`` tokens is what computing it alone
    from the start would give; ``asked`` is when, in nanoseconds, and ``last`` how many blocks leave a token to
    compute."""

    names: list[bytes]
    asked: int
    last: int
    done: int = 0

    def age(self, index: int) -> int:
        """When a block was used: a microsecond before the one in front of it, so that it goes before that."""
        return self.asked - 1000 * index


class PromptCache:
    """Saves and restores what ``cache`` holds of prompts that are computed in chunks of ``block`` tokens. ``root``
    stands for everything that fixes the bits."""

    def __init__(self, cache: BaseCache, block: int, root: bytes, memory: Memory | None, disk: Disk | None) -> None:
        self.cache = cache
        self.block = block
        self.root = root
        self.memory = memory
        self.disk = disk
        self.reused_tokens = 0
        self.memory_hits = 0
        self.disk_hits = 0
        self._asked = 0

    def prefix(self, tokens: Sequence[int], kind: bytes = b"") -> Prefix:
        """The blocks of a prompt; ``kind`` is what fixes its bits beside its tokens."""
        self._asked = max(time.time_ns(), self._asked + 1)
        names, name = [], _hash(self.root, kind)
        for start in range(0, len(tokens) - self.block + 1, self.block):
            name = _hash(name, array("q", tokens[start : start + self.block]).tobytes())
            names.append(name)
        return Prefix(names, self._asked, (len(tokens) - 1) // self.block)

    def restore(self, slot: int, prefix: Prefix) -> int:
        """Puts what is found of a prompt into a sequence without tokens, and gives how many those are."""
        if self.memory is not None:  # nothing of it goes for the sake of its own beginning
            for index, name in enumerate(prefix.names):
                self.memory.touch(name, prefix.age(index))
        if self.cache.whole_entries:
            found = next((i for i in range(prefix.last - 1, -1, -1) if self._restore(slot, prefix, i)), -1)
            prefix.done = (found + 1) * self.block
        else:
            while prefix.done < prefix.last * self.block and self._restore(slot, prefix, prefix.done // self.block):
                prefix.done += self.block
        self.reused_tokens += prefix.done
        return prefix.done

    def computed(self, slot: int, prefix: Prefix, start: int, stop: int) -> None:
        """Tokens ``start`` to ``stop`` of a prompt were computed: whole blocks of them are kept."""
        if start != prefix.done:  # a conversation goes on where it ended
            return
        while prefix.done + self.block <= stop:
            index = prefix.done // self.block
            prefix.done += self.block
            if not self.cache.whole_entries or index == prefix.last - 1:
                self._save(slot, prefix, index)

    def receipt(self) -> dict[str, Any]:
        """What is kept, what was found, and what could not be used."""
        memory, disk = self.memory, self.disk
        return {
            "reused_tokens": self.reused_tokens,
            "entries": 0 if memory is None else len(memory.entries),
            "bytes": 0 if memory is None else memory.nbytes,
            "memory_hits": self.memory_hits,
            "disk_hits": self.disk_hits,
            "damaged": 0 if disk is None else disk.damaged,
            "unwritten": 0 if disk is None else disk.unwritten,
        }

    def _range(self, index: int) -> tuple[int, int]:
        """The tokens of which an entry tells."""
        return 0 if self.cache.whole_entries else index * self.block, (index + 1) * self.block

    def _restore(self, slot: int, prefix: Prefix, index: int) -> bool:
        name, (start, stop) = prefix.names[index], self._range(index)
        read = None if self.memory is None else self.memory.reader(name)
        if read is not None:
            self.cache.restore(slot, start, stop, read)
            self.memory_hits += 1
        elif not self._read(slot, prefix, index):
            return False
        if self.disk is not None:
            self.disk.touch(name, prefix.age(index))
        return True

    def _read(self, slot: int, prefix: Prefix, index: int) -> bool:
        """Restores from the disk, and keeps what was read in memory."""
        if self.disk is None:
            return False
        start, stop = self._range(index)
        with self.disk.reader(prefix.names[index]) as read:
            if read is None:
                return False
            try:
                self.cache.restore(slot, start, stop, read)
            except OSError:  # of the disk, after all of it was read once
                self.disk.damaged += 1
                return False
        self.disk_hits += 1
        self._save(slot, prefix, index, written=True)
        return True

    def _save(self, slot: int, prefix: Prefix, index: int, written: bool = False) -> None:
        name, age, (start, stop) = prefix.names[index], prefix.age(index), self._range(index)
        nbytes = self.cache.entry_nbytes(slot, start, stop)
        if nbytes == 0:
            return
        save = partial(self.cache.save, slot, start, stop)
        if self.memory is not None:
            self.memory.put(name, nbytes, age, save)
        if self.disk is not None and not written:
            self.disk.put(name, nbytes, age, save)


def _hash(*parts: bytes) -> bytes:
    hashed = hashlib.blake2b(digest_size=NAME)
    for part in parts:
        hashed.update(part)
    return hashed.digest()
