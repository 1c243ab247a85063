"""The mixed-integer program behind a plan: what can be chosen, what is aimed at, and what was found.

One choice is taken of each group: a format for the matrices of a layer, methods for the cache. Bytes, divergence and
the seconds of computing add up over the groups. Of what can be streamed any share may be left on the disk; reading that
takes place while something is computed, so that a phase takes as long as the longer of the two. Chunks of a prompt are
of one size, which decides everything else: there is a table for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tightfit import child


@dataclass(frozen=True)
class Choice:
    """What one way of storing a group takes: bytes, nats per token, seconds of the workload's prompt and of its new
    tokens. Up to ``streamable`` bytes may be on the disk."""

    nbytes: int
    nats: float
    prefill: float
    decode: float
    streamable: int = 0


@dataclass(frozen=True)
class Table:
    """What there is to choose in each of ``groups``, and what is taken in any case: bytes, and seconds of both phases.

    ``stream_prefill`` and ``stream_decode`` are the seconds that a byte on the disk takes of each phase. Streaming
    takes ``readers`` bytes, and ``buffers`` times the largest share of a group that is on the disk.
    """

    groups: tuple[tuple[Choice, ...], ...]
    nbytes: int = 0
    prefill: float = 0.0
    decode: float = 0.0
    stream_prefill: float = 0.0
    stream_decode: float = 0.0
    buffers: int = 0
    readers: int = 0


@dataclass(frozen=True)
class Aim:
    """What to make small: a weighted sum of divergence (nats), seconds and bytes. With ``relative`` seconds are
    counted in those of the fastest answer.

    ``most_`` are limits. With ``tie`` the fastest answer is taken whose sum is at most so many times larger than the
    least, if it is not above ``tie_below`` either.
    """

    nats: float = 0.0
    seconds: float = 0.0
    nbytes: float = 0.0
    relative: bool = False
    most_nats: float | None = None
    most_seconds: float | None = None
    most_bytes: float | None = None
    streams: bool = False
    tie: float = 0.0
    tie_below: float | None = None


@dataclass(frozen=True)
class Answer:
    """Which table, the index of the choice in each of its groups, and about how many bytes are on the disk."""

    table: int
    choices: tuple[int, ...]
    streamed: int
    nats: float
    seconds: float
    nbytes: int


def solve(tables: Sequence[Table], aims: Sequence[Aim]) -> list[Answer | None]:
    """The answer to each aim, found by a solver in a process of its own; None where nothing meets its limits.

    Raises TightfitError if the solver fails or takes too long.
    """
    asked = {"tables": [asdict(table) for table in tables], "aims": [asdict(aim) for aim in aims]}
    found = child.ask("tightfit.plan.solve:solve_for_parent", asked)["answers"]
    return [None if each is None else Answer(**each | {"choices": tuple(each["choices"])}) for each in found]
