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

from tightfit.checkpoints.checkpoint import Checkpoint, TensorInfo
from tightfit.model.spec import ModelSpec
from tightfit.weights.placement.places import Group, Place
from tightfit.weights.placement.read import (
    FORMAT_OF,
    block_rows,
    block_scratch,
    is_plain,
    read_plain,
    read_rows,
    tensor_of,
)

PIECE = 8 << 20  # bytes of a compressed folder that a thread reads before it takes the next
FIXED = 4 << 20  # bytes: stacks of threads, and what the allocator does not give back at once
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
        return in_parallel(_pieces(checkpoint, parts), lambda piece: _read(checkpoint, *piece), workers(threads))
    return in_parallel(_rows(checkpoint, parts), lambda rows: _place(checkpoint, rows), workers(threads))


def workers(threads: int) -> int:
    """How many threads fill where ``threads`` may compute: one more, since some wait for the disk."""
    return min(threads, MOST_THREADS) + 1


def scratch_bytes(checkpoint: Checkpoint, spec: ModelSpec, threads: int) -> int:
    """What :func:`fill` takes for a moment beside the memory that it fills, at most."""
    if checkpoint.compressed is not None:
        return FIXED
    params = {param: None for _, param in spec.all_params()}
    return FIXED + workers(threads) * max((block_scratch(checkpoint, param) for param in params), default=0)


def _rows(checkpoint: Checkpoint, parts: Iterable[tuple[Group, torch.Tensor]]) -> Iterator[Rows]:
    for group, memory in parts:
        for place in group.places:
            rows = place.param.shape[0]
            for expert, data in enumerate(place.of(memory)):
                at_once = block_rows(checkpoint, place.param, expert)
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
    checkpoint.read_aligned(info, start, memory.numpy().data)
    return len(memory)


def _place(checkpoint: Checkpoint, rows: Rows) -> int:
    place, param = rows.place, rows.place.param
    info = tensor_of(checkpoint, param, rows.expert)
    if place.format is None:
        block = read_rows(checkpoint, param, rows.expert, rows.start, rows.stop)
        out = rows.data.view(torch.float32)[rows.start : rows.stop]
        torch.add(block[:, 0], param.add, out=out)
    elif is_plain(param, info) and place.format.name == FORMAT_OF[info.dtype]:
        begin, end = (place.format.nbytes(row, param.shape[1]) for row in (rows.start, rows.stop))
        read_plain(checkpoint, param, rows.expert, rows.start, rows.data[begin:end])
    else:
        block = read_rows(checkpoint, param, rows.expert, rows.start, rows.stop)
        place.format.encode(block, rows.data, rows.start)
    begin, end = (place.nbytes * row // param.shape[0] for row in (rows.start, rows.stop))
    return end - begin


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
