"""Fills memory with parameters: blocks of them are read, converted and placed on several threads.

Each thread takes the next block, reads it and converts it, so that reading and converting go on at the same time
whichever is slower, and the scratch is one block for each thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

import torch

from tightfit.budget import malloc
from tightfit.catalog import spec_string
from tightfit.checkpoints.checkpoint import Checkpoint, TensorInfo
from tightfit.checkpoints.positioned import REQUEST
from tightfit.errors import CheckpointError
from tightfit.kernels.encode import scratch_bytes as encode_scratch
from tightfit.weights.formats.base import Format
from tightfit.weights.formats.dense import Dense
from tightfit.weights.placement.places import Group, Place
from tightfit.weights.placement.read import (
    block_nbytes,
    block_rows,
    block_scratch,
    blocks,
    has_codes_of,
    is_stored_as,
    read_plain,
    read_tiles,
    tensor_of,
    tiles_scratch,
)

PIECE = 8 << 20  # bytes of a compressed folder that a thread reads before it takes the next
FIXED, OF_A_THREAD = 4 << 20, 1 << 20  # bytes: stacks, and what the allocator does not give back at once
MOST_THREADS = 8  # convert faster than any disk reads

Unit = TypeVar("Unit")


@dataclass(frozen=True)
class Rows:
    """The rows [start, stop) of one copy of a parameter, and the bytes of that whole copy."""

    place: Place
    expert: int
    start: int
    stop: int
    data: torch.Tensor


def fill(checkpoint: Checkpoint, parts: Iterable[tuple[Group, torch.Tensor]], threads: int) -> Iterator[int]:
    """Reads each group into its memory; gives, block after block, how many bytes were placed."""
    if checkpoint.compressed is not None:
        yield from in_parallel(_pieces(checkpoint, parts), lambda piece: _read(checkpoint, *piece), workers(threads))
        return
    memory = BlockMemory()
    with malloc.large_blocks_apart():
        yield from in_parallel(
            _rows(checkpoint, parts), lambda rows: _place(checkpoint, rows, memory), workers(threads)
        )


def workers(threads: int) -> int:
    """How many threads fill where ``threads`` may compute: one more, since some wait for the disk."""
    return min(threads, MOST_THREADS) + 1


def scratch_bytes(checkpoint: Checkpoint, group: Group, threads: int) -> int:
    """What :func:`fill` takes for a moment beside the memory that it fills, at most."""
    if checkpoint.compressed is not None:
        return FIXED
    each = max((_scratch(checkpoint, place) for place in group.places), default=0)
    return FIXED + workers(threads) * (OF_A_THREAD + REQUEST + each)


def _scratch(checkpoint: Checkpoint, place: Place) -> int:
    """The block that a thread holds, and what reading and converting it takes."""
    param, fmt = place.param, place.format
    if fmt is not None and has_codes_of(param, tensor_of(checkpoint, param), spec_string(fmt)):
        return tiles_scratch(checkpoint, param)
    block = block_scratch(checkpoint, param)
    if fmt is None or isinstance(fmt, Dense):
        return block
    numbers = block_rows(checkpoint, param) * param.shape[1]
    looking = 8 * numbers if _has_header(fmt) else 0  # two copies in float32
    return block + encode_scratch(param.shape[1]) + looking


def _has_header(fmt: Format) -> bool:
    """Whether a matrix has a header, which is found by going through all of it before the first row is encoded."""
    return type(fmt).begin is not Format.begin


def _rows(checkpoint: Checkpoint, parts: Iterable[tuple[Group, torch.Tensor]]) -> Iterator[Rows]:
    for group, memory in parts:
        for place in group.places:
            rows = place.param.shape[0]
            together = place.format is not None and _has_header(place.format)
            for expert, data in enumerate(place.of(memory)):
                at_once = rows if together else block_rows(checkpoint, place.param, expert)
                for start in range(0, rows, at_once):
                    yield Rows(place, expert, start, min(start + at_once, rows), data)


def _pieces(
    checkpoint: Checkpoint, parts: Iterable[tuple[Group, torch.Tensor]]
) -> Iterator[tuple[TensorInfo, int, torch.Tensor]]:
    """(tensor, first byte, memory) of a compressed folder."""
    for group, memory in parts:
        for start in range(0, group.nbytes, PIECE):
            yield checkpoint.tensors[group.name], start, memory[start : start + PIECE]


def _read(checkpoint: Checkpoint, info: TensorInfo, start: int, memory: torch.Tensor) -> int:
    checkpoint.read_into(info, start, memory.numpy().data)
    return len(memory)


class BlockMemory(threading.local):
    """Memory for the block that the calling thread reads."""

    memory: torch.Tensor | None = None

    def of(self, nbytes: int) -> torch.Tensor:
        """At least ``nbytes`` bytes."""
        if self.memory is None or len(self.memory) < nbytes:
            self.memory = torch.empty(nbytes, dtype=torch.uint8)
        return self.memory


def _place(checkpoint: Checkpoint, rows: Rows, memory: BlockMemory) -> int:
    place, param, fmt = rows.place, rows.place.param, rows.place.format
    info = tensor_of(checkpoint, param, rows.expert)
    if fmt is not None and is_stored_as(param, info, fmt.name):
        begin, end = (fmt.nbytes(row, param.shape[1]) for row in (rows.start, rows.stop))
        read_plain(checkpoint, param, rows.expert, rows.start, rows.data[begin:end])
    elif fmt is not None and has_codes_of(param, info, spec_string(fmt)):
        begin, end = (fmt.nbytes(row, param.shape[1]) for row in (rows.start, rows.stop))
        read_tiles(checkpoint, param, rows.expert, rows.start, rows.stop, rows.data[begin:end])
    else:
        source = Reading(checkpoint, rows, memory.of(block_nbytes(checkpoint, param, rows.expert)))
        try:
            if fmt is not None and _has_header(fmt):
                fmt.begin(rows.data, (param.shape[0], param.shape[1]), source.blocks)
            for row, block in source.blocks():
                _convert(place, block, rows.data, row)
        except CheckpointError as error:
            if source.at is None:
                raise
            where = f"rows {source.at[0]} to {source.at[1] - 1} of {info.name!r} of {checkpoint.name}"
            raise CheckpointError(f"{where}: {error.message}", error.hint) from error
    begin, end = (place.nbytes * row // param.shape[0] for row in (rows.start, rows.stop))
    return end - begin


@dataclass
class Reading:
    """The blocks of some rows; ``at`` is where the one that was given stands, None while the next is read."""

    checkpoint: Checkpoint
    rows: Rows
    memory: torch.Tensor
    at: tuple[int, int] | None = None

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        rows = self.rows
        param, memory = rows.place.param, self.memory
        for row, block in blocks(self.checkpoint, param, rows.expert, rows.start, rows.stop, memory):
            self.at = row, row + len(block)
            yield row, block
            self.at = None


def _convert(place: Place, block: torch.Tensor, data: torch.Tensor, row: int) -> None:
    if place.format is None:
        out = data.view(torch.float32)[row : row + len(block)]
        torch.add(block[:, 0], place.param.add, out=out)
    else:
        place.format.encode(block, data, row)


def in_parallel(units: Iterable[Unit], work: Callable[[Unit], int], count: int) -> Iterator[int]:
    """Calls ``work`` with each of ``units`` on ``count`` threads; gives what it returns, in the order in which they
    end. Units are begun in their order. The first error ends all and is raised; so does closing the iterator."""
    waiting, taking, done = iter(units), threading.Lock(), SimpleQueue[int | BaseException | None]()
    stopped = False

    def next_unit() -> Unit | None:
        with taking:
            return None if stopped else next(waiting, None)

    def run() -> None:
        try:
            while (unit := next_unit()) is not None:
                done.put(work(unit))
            done.put(None)
        except BaseException as error:
            done.put(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        running = count
        while running:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                running -= 1
            else:
                yield result
    finally:
        stopped = True
        for thread in threads:
            if thread.ident is not None:
                thread.join()
