"""Layers that turn out to be lazy while a prompt is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tightfit.budget.ledger import Arena
from tightfit.kv.cache import as_bytes, place


class Lazy:
    """Of some ``layers``, of which ``wanted`` become lazy: how lazy each is, ``ratios`` (sequences, layers) float32,
    and which were found to be, ``found`` (sequences, layers) int32."""

    def __init__(self, layers: Sequence[int], wanted: int, sequences: int, arena: Arena) -> None:
        self.layers = list(layers)
        self.wanted = wanted
        self.ratios = place(arena, (sequences, len(layers)), torch.float32)
        self.found = place(arena, (sequences, len(layers)), torch.int32)

    def has(self, layer: int, slot: int) -> bool:
        """Whether a layer is lazy."""
        return bool(self.found[slot, self.layers.index(layer)])

    def note(self, layer: int, slot: int, ratio: float) -> None:
        self.ratios[slot, self.layers.index(layer)] = ratio

    def find(self, slot: int, last: int | None) -> list[int]:
        """The layers up to ``last`` (None: all) that are lazy from now on: the laziest, as soon as more of them are not
        than may stay as they are. Of layers as lazy as each other it is the last."""
        found, ratios = self.found[slot], self.ratios[slot].tolist()
        stop = len(self.layers) if last is None else self.layers.index(last) + 1
        others = sorted((i for i in range(stop) if not found[i]), key=lambda i: (ratios[i], i))
        new = others[len(self.layers) - self.wanted :]
        found[new] = 1
        return [self.layers[index] for index in new]

    def clear(self, slot: int) -> None:
        self.ratios[slot] = 0.0
        self.found[slot] = 0

    def parts(self, slot: int) -> Iterator[torch.Tensor]:
        """What has to be saved of a sequence, as flat uint8 tensors."""
        yield as_bytes(self.ratios[slot])
        yield as_bytes(self.found[slot])
