"""What tokens there are, for methods that go by that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from tightfit.budget.ledger import Arena
from tightfit.errors import UsageError
from tightfit.kv.cache import numbers
from tightfit.kv.method import Naming, Read, Reads, Structured

Encode = Callable[[str], list[int]]


class Reading:
    """``ids`` (sequences, tokens) int32 are the tokens of each sequence, and ``marks`` those that ``method`` looks for,
    by the names of its settings."""

    def __init__(self, method: Reads, context: int, sequences: int, tail: int, arena: Arena) -> None:
        self.method = method
        self.acts = isinstance(method, Structured)  # when something ends; others see a prompt's tokens as they come
        self.ids = numbers(arena, sequences, context + tail)
        self.names = Names(sequences, method.tokens, arena) if isinstance(method, Naming) else None
        self._marks: dict[str, frozenset[int]] = {}
        named = {name: _texts(getattr(method, name)) for name in method.marks}
        if all(_number(text) is not None for texts in named.values() for text in texts):
            self.resolve(lambda text: [])

    @property
    def marks(self) -> Mapping[str, frozenset[int]]:
        if not self._marks:
            raise ValueError(f"the marks of {self.method.name} were not looked up in a vocabulary")
        return self._marks

    def resolve(self, encode: Encode) -> None:
        """Finds the tokens of texts. Raises UsageError for one that is not one token."""
        for name in self.method.marks:
            found = []
            for text in _texts(getattr(self.method, name)):
                number = _number(text)
                tokens = encode(text) if number is None else [number]
                if len(tokens) != 1:
                    raise UsageError(
                        f"{name} of {self.method.name} is {text!r}, and that is {len(tokens)} tokens of this model",
                        "Name texts of one token each, or tokens by their numbers: #17.",
                    )
                found += tokens
            self._marks[name] = frozenset(found)

    def told(self, slot: int, start: int, tokens: Sequence[int]) -> None:
        self.ids[slot, start : start + len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        if self.names is not None and isinstance(self.method, Naming):
            self.names.put(slot, self.method.named(self.seen(slot, start + len(tokens))))

    def commit(self, slot: int, start: int, path: Sequence[int]) -> None:
        """Of the tokens from ``start`` on those of ``path`` are certain."""
        self.ids[slot, start : start + len(path)] = self.ids[slot, [start + order for order in path]]

    def seen(self, slot: int, tokens: int) -> Read:
        return Read(self.ids[slot, :tokens], self.marks)

    def ends(self, slot: int, token: int) -> bool:
        """Whether something ends with a sequence's token."""
        return self.method.ends(self.marks, int(self.ids[slot, token]))

    def stretches(self, slot: int, start: int, count: int) -> list[tuple[int, int]]:
        """Parts of ``count`` tokens from ``start`` on, each up to one with which something ends."""
        ids = self.ids[slot, start : start + count].tolist()
        stops = [at + 1 for at, token in enumerate(ids) if self.method.ends(self.marks, token)]
        if not stops or stops[-1] < count:
            stops.append(count)
        return list(zip([0, *stops], stops, strict=False))


class Names:
    """What the next token of each sequence sees: places ``listed`` (sequences, n) int32, ascending and then -1, and all
    from ``since`` (sequences,) int32 on."""

    def __init__(self, sequences: int, most: int, arena: Arena) -> None:
        self.listed, self.since = numbers(arena, sequences, most), numbers(arena, sequences)

    def put(self, slot: int, named: tuple[list[int], int] | None) -> None:
        self.listed[slot] = -1
        self.since[slot] = 0
        if named is not None and len(named[0]) <= self.listed.shape[1]:
            self.listed[slot, : len(named[0])] = torch.tensor(named[0], dtype=torch.int32)
            self.since[slot] = named[1]


def _texts(setting: str) -> list[str]:
    return [text for text in setting.split("|") if text]


def _number(text: str) -> int | None:
    """The number of a token that is named by it: 17 of ``#17``."""
    return int(text[1:]) if text[0] == "#" and text[1:].isdecimal() else None
