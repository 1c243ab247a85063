"""Which tokens are computed in the next step.

Every running sequence that decodes gives one token; what remains of the step's prompt tokens goes to the sequences that
are still being prefilled, in the order in which they came. A sequence's chunks start at multiples of the chunk size,
whatever else runs, so that its bits do not depend on its neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from tightfit.engine.sequence import Sequence
from tightfit.kernels.matmul import bucket
from tightfit.model.batch import Batch, Segment


class Scheduler:
    """Holds ``slots`` sequences at once and computes at most ``chunk`` prompt tokens in a step, padding included;
    others wait. If ``layered``, a step computes one whole prompt and nothing else. ``recall`` is called with a sequence
    before its first token is computed: it may find some of them in a cache."""

    def __init__(
        self,
        slots: int,
        chunk: int,
        layered: bool = False,
        recall: Callable[[Sequence], None] = lambda sequence: None,
    ) -> None:
        self.chunk = chunk
        self.layered = layered
        self._recall = recall
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._free = list(range(slots - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> tuple[Batch, list[Sequence]]:
        """The next batch, and the sequences of its segments in the batch's order."""
        while self.waiting and (self._free or self.waiting[0].slot >= 0):
            sequence = self.waiting.popleft()
            if sequence.slot < 0:
                sequence.slot = self._free.pop()
            self.running.append(sequence)
        if self.layered:
            for sequence in self.running:
                if not sequence.decoding:
                    if sequence.computed == 0:
                        self._recall(sequence)
                    return Batch((self._prefill(sequence, len(sequence.tokens)),)), [sequence]
        picked = [(self._decode(s), s) for s in self.running if s.decoding]
        room = bucket(self.chunk)  # rows, with those that gemm is padded with: scratch and time go by them
        for sequence in self.running:
            if sequence.decoding:
                continue
            if self._rows(sequence) > room:
                continue
            if sequence.computed == 0:  # as late as can be: others may have computed the same beginning
                self._recall(sequence)
            room -= self._rows(sequence)
            stop = self._stop(sequence)
            picked.append((self._prefill(sequence, stop), sequence))
        return Batch(tuple(segment for segment, _ in picked)), [sequence for _, sequence in picked]

    def _stop(self, sequence: Sequence) -> int:
        """Where the next chunk of a prompt ends."""
        return min((sequence.computed // self.chunk + 1) * self.chunk, len(sequence.tokens))

    def _rows(self, sequence: Sequence) -> int:
        """What the next chunk of a prompt takes of a step."""
        return bucket(self._stop(sequence) - sequence.computed)

    def finish(self, sequence: Sequence, keep_slot: bool = False) -> None:
        """Takes a sequence out; its slot is free again unless a conversation keeps it."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.slot >= 0 and not keep_slot:
            self.release(sequence.slot)

    def release(self, slot: int) -> None:
        self._free.append(slot)

    @staticmethod
    def _decode(sequence: Sequence) -> Segment:
        return Segment(sequence.slot, sequence.computed, sequence.tokens[-1:], decode=True)

    @staticmethod
    def _prefill(sequence: Sequence, stop: int) -> Segment:
        last = stop == len(sequence.tokens)
        tokens = sequence.tokens[sequence.computed : stop]
        return Segment(
            sequence.slot,
            sequence.computed,
            tokens,
            logits="last" if last else "none",
            length=len(sequence.tokens),
        )
