"""A ragged batch: one flat list of tokens and a table of segments.

Single prompts, batches, chunks of long prompts and decoding steps are all the same call of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from tightfit.weights.formats.base import Split


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sequence.

    ``slot`` is the sequence's place in the cache, ``start`` the position of its first token here. A segment with
    ``decode`` is multiplied by the vector kernels, token by token; the others are one gemm each. ``logits`` says for
    which tokens logits are wanted. ``length`` is that of the whole prompt while its chunks are prefilled: rotary kinds
    whose frequencies depend on the length (dynamic, longrope) then use the same ones for all chunks. Elsewhere it is
    None, and the length is that of the sequence so far. ``parents`` make the tokens of a segment with ``decode`` a
    tree: of each the place in the segment of the token before it, an earlier one, or -1 for the first ones.
    """

    slot: int
    start: int
    tokens: Sequence[int]
    decode: bool = False
    logits: Literal["none", "last", "all"] = "last"
    length: int | None = None
    parents: Sequence[int] | None = None

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    @cached_property
    def paths(self) -> list[list[int]]:
        """Of each token the places in the segment of those from its root on, its own included."""
        if self.parents is None:
            return [list(range(index + 1)) for index in range(len(self.tokens))]
        paths: list[list[int]] = []
        for index, parent in enumerate(self.parents):
            paths.append([*(paths[parent] if parent >= 0 else ()), index])
        return paths

    @property
    def positions(self) -> Sequence[int]:
        """Of each token its position in the sequence."""
        if self.parents is None:
            return range(self.start, self.stop)
        return [self.start + len(path) - 1 for path in self.paths]


@dataclass(frozen=True)
class Batch:
    """Segments in the order in which their tokens lie in the flat list: those that decode come first."""

    segments: tuple[Segment, ...]

    @staticmethod
    def of(segments: Sequence[Segment]) -> Batch:
        return Batch(tuple(sorted(segments, key=lambda segment: not segment.decode)))

    @cached_property
    def size(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)

    @cached_property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Of each segment, where its tokens lie in the flat list."""
        ranges, at = [], 0
        for segment in self.segments:
            ranges.append((at, at + len(segment.tokens)))
            at += len(segment.tokens)
        return tuple(ranges)

    @cached_property
    def prefills(self) -> tuple[tuple[Segment, int, int], ...]:
        """(segment, first row, last row + 1) for the segments that are prefilled."""
        both = zip(self.segments, self.ranges, strict=True)
        return tuple((segment, start, stop) for segment, (start, stop) in both if not segment.decode)

    @cached_property
    def pieces(self) -> tuple[tuple[Segment, int, int], ...]:
        """(segment, first row, last row + 1) for what is rotated together: a prefill segment whole, of one that decodes
        each token alone, so that its bits do not depend on how many are verified at once."""
        pieces = []
        for segment, (start, stop) in zip(self.segments, self.ranges, strict=True):
            if not segment.decode:
                pieces.append((segment, start, stop))
                continue
            for index, (token, position) in enumerate(zip(segment.tokens, segment.positions, strict=True)):
                alone = replace(segment, start=position, tokens=(token,), parents=None)
                pieces.append((alone, start + index, start + index + 1))
        return tuple(pieces)

    @cached_property
    def split(self) -> Split:
        """Which rows are multiplied by the vector kernel, and which by one gemm each."""
        vector = sum(len(segment.tokens) for segment in self.segments if segment.decode)
        return Split(vector, tuple((start, stop) for _, start, stop in self.prefills))

    @cached_property
    def tokens(self) -> torch.Tensor:
        """(tokens,) int64"""
        return torch.tensor([token for segment in self.segments for token in segment.tokens], dtype=torch.int64)

    @cached_property
    def positions(self) -> torch.Tensor:
        """(tokens,) float32: positions are exact up to 2**24."""
        return torch.cat(
            [
                torch.arange(segment.start, segment.stop, dtype=torch.float32)
                if segment.parents is None
                else torch.tensor(segment.positions, dtype=torch.float32)
                for segment in self.segments
            ]
        )

    @property
    def vector(self) -> int:
        """How many tokens, the first ones, decode."""
        return self.split.vector

    @cached_property
    def tentative(self) -> bool:
        """Whether tokens that decode may turn out not to belong to their sequences."""
        return any(segment.decode and len(segment.tokens) > 1 for segment in self.segments)

    @cached_property
    def paths(self) -> torch.Tensor | None:
        """(tokens that decode, depth) int32: of each the places in its segment from its root on, then -1. None where
        there are no trees."""
        segments = [segment for segment in self.segments if segment.decode]
        # One token alone is no tree: such a step is repeated for others, which come elsewhere.
        if all(segment.parents is None or len(segment.tokens) == 1 for segment in segments):
            return None
        paths = [path for segment in segments for path in segment.paths]
        depth = max(map(len, paths))
        return torch.tensor([path + [-1] * (depth - len(path)) for path in paths], dtype=torch.int32)

    @cached_property
    def committed(self) -> torch.Tensor:
        """(tokens that decode,) int64: of each how many tokens of its sequence are certain."""
        return torch.tensor([segment.start for segment in self.segments if segment.decode for _ in segment.tokens])

    @cached_property
    def places(self) -> torch.Tensor:
        """(tokens, 2) int32: of each token its sequence's place in the cache, and its place in the sequence; tokens of
        a segment lie one behind the other, whatever tree they are."""
        places = [(segment.slot, at) for segment in self.segments for at in range(segment.start, segment.stop)]
        return torch.tensor(places, dtype=torch.int32).view(-1, 2)

    @cached_property
    def logit_rows(self) -> torch.Tensor:
        """(n,) int64: the rows of the flat list for which logits are wanted, segment by segment."""
        rows: list[int] = []
        for segment, (start, stop) in zip(self.segments, self.ranges, strict=True):
            if segment.logits == "last":
                rows.append(stop - 1)
            elif segment.logits == "all":
                rows.extend(range(start, stop))
        return torch.tensor(rows, dtype=torch.int64)
