"""Keys that are turned to other positions than they were computed at."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import attention, ops
from tightfit.kernels.pages import Pages, Run
from tightfit.kv.base import Rotation, Step
from tightfit.kv.merge.tokens import TokensAt
from tightfit.kv.method import Structured
from tightfit.kv.reading import Reading


class Turning:
    """Of one layer, in which the i-th token of a head's list stands at position i; a head has at most ``most``."""

    def __init__(self, pages: Pages, rotation: Rotation, most: int) -> None:
        self.pages, self.rotation, self.most = pages, rotation, most
        self._frequencies = torch.tensor(rotation.frequencies)

    def turn(self, slot: int, run: Run, indices: torch.Tensor, counts: list[int], ws: Workspace) -> torch.Tensor:
        """Turns tokens that stay, ``indices`` (kv_heads, m) int32 and how many of each head, to where they stand then.
        Those that move lie in the run, behind its own tokens; gives the indices by which they are found there."""
        found = indices.clone()
        for head, count in enumerate(counts):
            total = int(self.pages.lengths[slot, head]) + run.count
            places = indices[head, :count].long()
            moved = (places != torch.arange(count)).nonzero()[:, 0]
            if len(moved):
                self._head(slot, head, run, places[moved], moved, ws)
                found[head, moved] = torch.arange(total, total + len(moved), dtype=torch.int32)
        return found

    def take_most(self, slot: int, run: Run, ws: Workspace) -> None:
        """Takes the scratch of turning as many tokens as can be."""
        places = torch.arange(self.most)
        self._head(slot, 0, run, places, places, ws)

    def _head(self, slot: int, head: int, run: Run, places: torch.Tensor, to: torch.Tensor, ws: Workspace) -> None:
        at, moved, half = run.count, (to - places).float(), len(self._frequencies)
        for block in TokensAt(self.pages, slot, head, run, places, ws).blocks():
            count = len(block.keys)
            with ws.frame():
                cos, sin = ws.empty(2, count, half)
                ops.rotation(moved[:count], self._frequencies, 1.0, cos, sin)
                if half:
                    attention.rotate_(block.keys.unsqueeze(1), cos, sin, self.rotation.interleaved, ws)
            for of_run, turned in zip((run.keys, run.values), block, strict=True):
                if turned is not None:
                    ops.copy_(of_run[head, at : at + count], turned)
            at, moved = at + count, moved[count:]


def stand(
    kept: Pages,
    reading: Reading,
    evictor: Structured,
    limit: Callable[[int], int],
    step: Step,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Where the tokens of a step stand, which come at ``positions`` (tokens,): right behind what is kept then, of so
    many tokens as ``limit`` says of those that came."""
    assert kept.positions is not None
    found = positions.clone()
    for segment, (a, b) in zip(step.segments, step.ranges, strict=True):
        slot = segment.slot
        listed = kept.positions[slot, 0, : int(kept.lengths[slot, 0])].long()
        for first, stop in reading.stretches(slot, segment.start, b - a):
            found[a + first : a + stop] = len(listed) + torch.arange(stop - first)
            if stop == b - a:
                break  # what is kept then does not matter to this step
            tokens = segment.start + stop
            listed = torch.cat([listed, torch.arange(segment.start + first, tokens)])
            stays = evictor.stays(reading.seen(slot, tokens))
            listed = listed[stays[listed]][-limit(tokens) :]
    return found
