"""How fast a machine computes, as plain numbers: what `plan/profile.py` measured and `budget/machine.py` keeps.

All are seconds for one unit of work, so that they add up. Imports nothing heavy: a run reads them too.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from tightfit.budget.machine import MachineRecord
from tightfit.kernels import cpu
from tightfit.plan.schema import Numerics, Strict

VERSION: Literal[1] = 1
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Curve = Annotated[dict[int, Positive], Field(min_length=1)]  # by a number of tokens, heads, threads or bytes
Surface = Annotated[dict[int, Curve], Field(min_length=1)]  # by features, then by another number
Kept = TypeVar("Kept", bound=Strict)


def at(curve: Mapping[int, float], place: float) -> float:
    """The value of a measured curve at ``place``: straight lines through what was measured, which go on behind its
    end; before its beginning the first value."""
    known = sorted(curve)
    if len(known) == 1 or place <= known[0]:
        return curve[known[0]]
    index = min(bisect_left(known, place), len(known) - 1)
    low, high = known[index - 1], known[index]
    slope = (curve[high] - curve[low]) / (high - low)
    return curve[high] + slope * (place - high) if place <= high else curve[high] + max(slope, 0.0) * (place - high)


def across(surface: Mapping[int, Mapping[int, float]], features: float, place: float) -> float:
    """The value of a measured surface: as :func:`at` along both."""
    return at({known: at(curve, place) for known, curve in surface.items()}, features)


class FormatSpeed(Strict):
    """How fast matrices of one format are multiplied. ``vector``: seconds for each byte of the matrix, by how many
    tokens decode at once; ``product``: seconds for each weight, by the prompt tokens of a chunk."""

    bytes_per_weight: Positive
    vector: Curve
    product: Curve


class AttentionSpeed(Strict):
    """What attention over a cache takes, by the features of keys and values together.

    Decoding: ``layer`` seconds for each layer, and ``decode`` for each token and head of the cache, by how many heads
    share one. A chunk of a prompt: ``query`` for each token and head, and ``prefill`` for each key that they look at,
    both by the tokens of the chunk.
    """

    layer: Positive
    decode: Surface
    query: Surface
    prefill: Surface


class DiskSpeed(Strict):
    """Bytes per second of a cold file. ``streamed``: as streaming reads, several threads at once, to where it is used,
    and ``copied`` where what is read does not begin at a multiple of 4 KiB; ``blocks``: one thread in order, by the
    bytes of a request. ``overlap`` is the share of the shorter one of computing and reading that is not hidden behind
    the longer one."""

    streamed: Positive
    copied: Positive
    blocks: Curve
    overlap: Annotated[float, Field(ge=0, le=1)]


class Speeds(Strict):
    """What was measured with so many threads and these types.

    ``read``: bytes per second of memory, by threads. ``formats`` and ``attention`` are by spec string. Seconds for each
    number of a prompt's activations: ``norm``, ``glu`` (of the feed-forward part), ``rotate`` (queries and keys, and
    keeping keys and values), ``lookup`` (embeddings). Seconds of all else: ``layer``, by the hidden size, for each
    layer of a decoding step that repeats the one before, ``anew`` beside that for each of another step, ``step`` for a
    step.
    """

    version: Literal[1] = VERSION
    threads: int = Field(ge=1)
    numerics: Numerics
    padded: bool = Field(description="whether prompts are computed in powers of two of tokens")
    read: Curve
    formats: dict[str, FormatSpeed]
    attention: dict[str, AttentionSpeed]
    norm: Positive
    glu: Positive
    rotate: Positive
    lookup: Positive
    layer: Curve
    anew: Positive
    step: Positive
    disk: DiskSpeed | None = Field(default=None, description="of the device that the model is on, where it is known")


def speeds_key(threads: int, numerics: Numerics) -> str:
    """What a record keeps speeds under: what they depend on beside the machine."""
    types = " ".join(f"{name}={value}" for name, value in numerics.model_dump().items())
    return f"{threads} threads, {types}, {cpu.features()['chosen']}"


def device_of(path: Path) -> str:
    """``major:minor`` of the device that a file is on."""
    status = path.stat()
    return f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"


def known_speeds(record: MachineRecord, threads: int, numerics: Numerics, file: Path | None = None) -> Speeds | None:
    """The speeds that are in ``record``, None if there are none, or of another version; with those of the disk that
    ``file`` is on."""
    found = _valid(Speeds, record.speeds.get(speeds_key(threads, numerics)))
    if found is None or file is None:
        return found
    disk = _valid(DiskSpeed, record.disks.get(device_of(file)))
    return found if disk is None else found.model_copy(update={"disk": disk})


def _valid(kind: type[Kept], content: Any) -> Kept | None:
    try:
        return kind.model_validate(content)
    except ValidationError:
        return None
