"""What a selector knows after each token of a sequence, of which some may turn out not to belong to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tightfit.budget.ledger import Arena
from tightfit.kernels.pages import Rows
from tightfit.kv.cache import as_bytes, place

NEVER = 1 << 30  # steps ago


class Tentative:
    """Tensors of which each sequence has one that is certain, and one after each of ``tail`` tentative tokens."""

    def __init__(self, sequences: int, tail: int, arena: Arena) -> None:
        self._arena, self._shape = arena, (sequences, tail + 1)
        self.current = place(arena, (sequences,), torch.int32)  # which is the certain one
        self._all: list[torch.Tensor] = []

    def add(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Room for one more tensor of ``shape``: (sequences, states, *shape)."""
        self._all.append(place(self._arena, (*self._shape, *shape), dtype))
        return self._all[-1]

    def steps(self, rows: Rows, tokens: torch.Tensor, count: int) -> Iterator[tuple[int, int, int, int]]:
        """Of each row its own number, its sequence, the state before it and the one after it; ``tokens`` (sequences,)
        are certain."""
        states = self._shape[1]
        paths = None if rows.paths is None else rows.paths.tolist()
        for row, (slot, position) in enumerate(rows.places[:count].tolist()):
            order, current = position - int(tokens[slot]), int(self.current[slot])
            before = order - 1
            if paths is not None:
                path = [node for node in paths[row] if node >= 0]
                before = path[-2] if len(path) > 1 else -1
            yield row, slot, (current + 1 + before) % states, (current + 1 + order) % states

    def commit(self, slot: int, path: Sequence[int]) -> None:
        if path:
            self.current[slot] = (int(self.current[slot]) + 1 + path[-1]) % self._shape[1]

    def parts(self, slot: int) -> Iterator[torch.Tensor]:
        for tensor in self._all:
            yield as_bytes(tensor[slot, int(self.current[slot])])
