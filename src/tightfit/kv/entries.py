"""What pages hold of one sequence, part by part, so that it can be saved and restored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from tightfit.kernels.pages import PAGE, Pages
from tightfit.kv.cache import as_bytes


class InFile(NamedTuple):
    """A page that lies in the file."""

    at: int
    nbytes: int


def parts(
    kept: Pages, slot: int, ahead: int, mass: torch.Tensor | None, states: Sequence[torch.Tensor]
) -> Iterator[torch.Tensor | InFile]:
    """All that a layer keeps of a sequence, as flat uint8 tensors and pages in the file: what tokens received, ``mass``
    (sequences, kv_heads, blocks, n), and what methods remember, ``states`` (sequences, ...), with it. ``ahead``
    positions behind the kept tokens are there too. Which pages are free is not: layers may have theirs in common.

    What comes later follows from what came before, so that the same walk fills a sequence that is restored.
    """
    for numbers in (kept.lengths, kept.coded, kept.cold, kept.bounded):
        yield as_bytes(numbers[slot])
    yield as_bytes(kept.table[slot])
    if kept.channels is not None:
        yield as_bytes(kept.channels[slot])
    for state in (*kept.tables, *states):
        yield as_bytes(state[slot])
    for head, length in enumerate(kept.lengths[slot].tolist()):
        if kept.positions is not None:  # those of the next tokens are there too
            yield as_bytes(kept.positions[slot, head, : length + ahead])
        if mass is not None:
            for block in mass[slot, head]:
                yield as_bytes(block[:length])
        if kept.bounds is not None:
            yield as_bytes(kept.bounds[slot, head, : int(kept.bounded[slot, head])])
        yield from _pages_of(kept, slot, head, -(-length // PAGE))


def _pages_of(kept: Pages, slot: int, head: int, count: int) -> Iterator[torch.Tensor | InFile]:
    """Keys and values of a head's first ``count`` pages."""
    cold, coded = int(kept.cold[slot, head]), int(kept.coded[slot, head])
    for j, number in enumerate(kept.table[slot, head, :count].tolist()):
        if j < cold:
            yield from (InFile(*where) for where in kept.file_places(slot, head, j))
            continue
        keys: torch.Tensor = kept.keys
        values: torch.Tensor | None = kept.values
        if kept.coded_keys is not None and j < coded:
            keys, values = kept.coded_keys, kept.coded_values
        yield as_bytes(keys[slot, number])
        if values is not None and not kept.shared:
            yield as_bytes(values[slot, number])
