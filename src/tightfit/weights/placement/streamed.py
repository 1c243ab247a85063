"""Streamed placement: of each layer some parameters stay in memory, of the head some rows, and the others come from the
disk when they are needed, through a ring of buffers that is filled ahead of the computation.

After FlexGen (https://arxiv.org/abs/2303.06865), Superpipeline (https://arxiv.org/abs/2410.08791) and FlexInfer
(https://arxiv.org/abs/2503.03777): what stays is spread evenly over the layers, so that each waits for the disk
equally long. It departs from them in what it moves: what is left of a layer as it lies in the file, in a few large
requests; and it moves the head too, which in small models with large vocabularies is a fifth of all.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from tightfit.budget.ledger import Arena, align
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.checkpoints.positioned import ALIGNMENT, REQUEST, SMALL
from tightfit.kernels import cpu
from tightfit.kernels.layout import TILE_ROWS
from tightfit.model.spec import ModelSpec
from tightfit.plan.schema import ActivationType
from tightfit.weights.placement.base import Parameters, Placement, layer_parameters
from tightfit.weights.placement.fill import fill
from tightfit.weights.placement.places import EMBEDDINGS, HEAD, Group, Place, group_of
from tightfit.weights.placement.read import is_stored_as, read_bytes, tensor_of
from tightfit.weights.placement.readers import PIECE, READERS, Piece
from tightfit.weights.placement.resident import Progress, parameter
from tightfit.weights.placement.ring import Read, Ring
from tightfit.weights.placement.rows import RowsOnDisk, StreamedRows, by_rows, rows_of

OF_A_READER = REQUEST + (256 << 10)  # bytes: requests that memory is not aligned for, and a stack


def streamable(checkpoint: Checkpoint, place: Place) -> bool:
    """Whether the bytes of a place stand in the file as they stand in memory."""
    if checkpoint.compressed is not None:
        return True
    fmt = place.format
    return fmt is not None and is_stored_as(place.param, tensor_of(checkpoint, place.param), fmt.name)


def least_resident(checkpoint: Checkpoint, group: Group) -> int:
    """How many of a group's first places must stay in memory."""
    fixed = [index for index, place in enumerate(group.places) if not streamable(checkpoint, place)]
    return fixed[-1] + 1 if fixed else 0


def cut_at(group: Group, resident: int) -> tuple[int, int]:
    """(bytes of the first ``resident`` places, where the streamed rest begins: a multiple of 4 KiB before its first
    byte, for direct I/O)."""
    end = group.places[resident].offset if resident < len(group.places) else group.nbytes
    return end, end // ALIGNMENT * ALIGNMENT


def streamed_nbytes(group: Group, resident: int) -> int:
    """Bytes that are read for each use of a group of which the first ``resident`` places stay."""
    return 0 if resident == len(group.places) else group.nbytes - cut_at(group, resident)[1]


@dataclass(frozen=True)
class Outer:
    """The parameters outside of the layers where layers are streamed.

    ``on_disk``: of embeddings that are not the head only the rows of a step's tokens are read. ``rows`` is how many the
    head's matrix has, the last place of its group, and ``least`` how many of them must stay in memory: none, or all.
    """

    embeddings: Group
    head: Group
    tied: bool
    on_disk: bool
    rows: int
    least: int

    @staticmethod
    def of(checkpoint: Checkpoint, spec: ModelSpec, embeddings: Group, head: Group) -> Outer:
        def by_row(group: Group) -> bool:
            return by_rows(group.places[-1]) and streamable(checkpoint, group.places[-1])

        matrix = embeddings if spec.tied else head
        rows = matrix.places[-1].param.shape[0]
        on_disk = not spec.tied and by_row(embeddings)
        return Outer(embeddings, head, spec.tied, on_disk, rows, 0 if by_row(matrix) else rows)

    @property
    def matrix(self) -> Group:
        """The group whose last place is the head's matrix."""
        return self.embeddings if self.tied else self.head

    def kept(self, rows: int) -> list[Group]:
        """What is in memory where the first ``rows`` rows of the head stay."""
        matrix, last = self.matrix, self.matrix.places[-1]
        places = matrix.places[:-1] + ((rows_of(last, 0, rows) if rows < self.rows else last,) if rows else ())
        first_rows = Group(matrix.name, places, places[-1].end if places else 0)
        if self.tied:
            return [first_rows, self.head]
        return [first_rows] if self.on_disk else [self.embeddings, first_rows]

    @property
    def tile_nbytes(self) -> int:
        """Bytes of 16 rows of the head."""
        last = self.matrix.places[-1]
        assert last.format is not None
        return last.format.nbytes(TILE_ROWS, last.param.shape[1])

    def least_unit(self, rows: int) -> int:
        """Bytes of the smallest part in which the rows after the first ``rows`` are read: smaller requests would be
        slow, and more of what is read would be what lies before, down to where direct I/O may begin."""
        tiles = -(-(self.rows - rows) // TILE_ROWS)
        return min(tiles, -(-SMALL // self.tile_nbytes)) * self.tile_nbytes + ALIGNMENT if tiles else 0

    def share(self, share: float) -> int:
        """About so much of the rows, in whole tiles."""
        return self.rows if share == 1 else max(int(share * self.rows) // TILE_ROWS * TILE_ROWS, self.least)

    def units(self, rows: int, room: int) -> list[Place]:
        """The rows after the first ``rows``, in as few parts as fit into ``room`` bytes each, and equally large."""
        if rows == self.rows:
            return []
        tiles = -(-(self.rows - rows) // TILE_ROWS)
        parts = -(-tiles // ((room - ALIGNMENT) // self.tile_nbytes))
        each = -(-tiles // parts) * TILE_ROWS
        starts = range(rows, self.rows, each)
        return [rows_of(self.matrix.places[-1], start, min(start + each, self.rows)) for start in starts]


@dataclass(frozen=True)
class Kept:
    """What stays in memory: the first ``layers[i]`` parameters of layer i, and the first ``rows`` rows of the head."""

    layers: tuple[int, ...]
    rows: int


def buffer_nbytes(outer: Outer, groups: Sequence[Group], kept: Kept) -> int:
    """What a buffer must hold: the largest rest of a layer. The head is read in parts that fit."""
    largest = max(streamed_nbytes(group, count) for group, count in zip(groups, kept.layers, strict=True))
    return max(largest, outer.least_unit(kept.rows))


def streaming_nbytes(outer: Outer, groups: Sequence[Group], kept: Kept, buffers: int) -> int:
    """What the ``weights`` account takes where ``kept`` stays, of ``groups`` and of what is outside of the layers."""
    resident = sum(align(cut_at(group, count)[0]) for group, count in zip(groups, kept.layers, strict=True))
    resident += sum(align(group.nbytes) for group in outer.kept(kept.rows))
    buffer = align(buffer_nbytes(outer, groups, kept), ALIGNMENT)
    return resident + ALIGNMENT + (buffers * buffer + READERS * OF_A_READER if buffer else 0)


def spread(outer: Outer, groups: Sequence[Group], least: Sequence[int], buffers: int, room: int) -> Kept | None:
    """What stays where the ``weights`` account may take ``room`` bytes: as much as fits, so that all layers have about
    as much to read, and of the head about the same share as of the layers. None if even ``least`` does not fit.

    Layers take turns in an order in which each first half of it is spread over all of them. What is too little for the
    next parameter of a layer is filled with rows of the head.
    """
    counts, best = list(least), None
    bits = (len(groups) - 1).bit_length()
    order = sorted(range(len(groups)), key=lambda index: f"{index:0{bits}b}"[::-1])
    whole = 0
    while True:
        left = [streamed_nbytes(group, count) for group, count in zip(groups, counts, strict=True)]
        whole = whole or sum(left)
        kept = Kept(tuple(counts), outer.share(1 - sum(left) / whole if whole else 1.0))
        free = room - streaming_nbytes(outer, groups, kept, buffers)
        if free >= 0:
            more = free // align(outer.tile_nbytes) * TILE_ROWS
            best = replace(kept, rows=min(kept.rows + more, outer.rows))
        most = max(left)
        if not most:
            return best
        counts[next(index for index in order if left[index] == most)] += 1


class Stream:
    """Runs of bytes that go through a ring of buffers of the largest one's size, each used as the parameters in it.

    Unit i is what lies in ``units[i]``, a group of which the first byte is wanted that is given with it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        units: Sequence[tuple[Group, int]],
        buffers: int,
        arena: Arena,
        settings: tuple[torch.dtype, ActivationType],
    ) -> None:
        self._units, self._settings = units, settings
        sizes = [group.nbytes - begin for group, begin in units]
        self._buffers = [_aligned(arena, max(sizes, default=0)) for _ in range(buffers)]
        self.ring = Ring(sizes, self._buffers, _reader(checkpoint, units), READERS, PIECE)

    @contextmanager
    def use(self, unit: int) -> Iterator[dict[str, Any]]:
        """The parameters of a unit. They are made for each use, which takes far less time than reading them: kept,
        those of a large model would take megabytes that no account holds."""
        group, begin = self._units[unit]
        with self.ring.use(unit) as buffer:
            data = self._buffers[buffer]
            yield {
                place.param.name: parameter(
                    place, replace(place, offset=place.offset - begin).of(data), *self._settings
                )
                for place in group.places
            }


def _reader(checkpoint: Checkpoint, units: Sequence[tuple[Group, int]]) -> Read:
    """What reads a piece of a unit."""

    def read(unit: int, piece: Piece, out: torch.Tensor) -> None:
        group, begin = units[unit]
        if checkpoint.compressed is not None:
            checkpoint.read_into(checkpoint.tensors[group.name], begin + piece.start, out.numpy().data)
            return
        for place in group.places:
            for expert in range(place.copies):
                at = place.offset + expert * place.stride - begin
                start, stop = max(at, piece.start), min(at + place.nbytes, piece.stop)
                if start < stop:
                    part = out[start - piece.start : stop - piece.start]
                    read_bytes(checkpoint, place.param, expert, start - at, part)

    return read


class Streamed(Placement):
    """What ``kept`` says stays in ``arena``; what is left of each layer, and then of the head, goes through ``buffers``
    buffers.

    ``layers`` are the parameters of each, ``outer`` is the spec string of the embeddings and the head. Nothing is read
    before :meth:`load`.
    """

    fixed = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        outer: str,
        layers: Sequence[Group],
        gemm_dtype: torch.dtype,
        arena: Arena,
        activations: ActivationType,
        kept: Kept,
        buffers: int,
    ) -> None:
        self._checkpoint = checkpoint
        self._settings = settings = gemm_dtype, activations
        around = Outer.of(checkpoint, spec, *(group_of(checkpoint, spec, name, outer) for name in (EMBEDDINGS, HEAD)))

        self._kept: list[tuple[Group, torch.Tensor]] = []
        model: dict[str, Any] = {}
        for group in around.kept(kept.rows):
            model |= self._keep(group, arena.take(group.nbytes))
        self._layers: list[dict[str, Any]] = []
        self._unit_of: dict[int, int] = {}  # of layers of which something is streamed
        units: list[tuple[Group, int]] = []
        for index, (group, count) in enumerate(zip(layers, kept.layers, strict=True)):
            end, begin = cut_at(group, count)
            self._layers.append(self._keep(Group(group.name, group.places[:count], end), arena.take(end)))
            if count < len(group.places):
                self._unit_of[index] = len(units)
                units.append((replace(group, places=group.places[count:]), begin))
        self._whole = {
            index: layer_parameters(layer) for index, layer in enumerate(self._layers) if index not in self._unit_of
        }
        for place in around.units(kept.rows, buffer_nbytes(around, layers, kept)):
            begin = place.offset // ALIGNMENT * ALIGNMENT
            units.append((Group(around.matrix.name, (place,), place.end), begin))

        self._stream = Stream(checkpoint, units, buffers, arena, settings)
        self._of_head = range(len(self._unit_of), len(units))
        if around.on_disk:
            [place] = around.embeddings.places
            model[place.param.name] = RowsOnDisk(checkpoint, around.embeddings, place, settings)
        if self._of_head:
            place = around.matrix.places[-1]
            model[place.param.name] = StreamedRows(
                checkpoint,
                around.matrix,
                place,
                settings,
                model.get(place.param.name),
                self._of_head,
                self._stream.use,
            )
        self.model = Parameters(model)
        weakref.finalize(self, self._stream.ring.stop)

    @property
    def used_bytes(self) -> int:
        return self._stream.ring.used

    @property
    def waited_seconds(self) -> float:
        return self._stream.ring.waited

    def load(self, progress: Progress = lambda nbytes: None) -> None:
        """Reads what stays."""
        left = sum(group.nbytes for group, _ in self._kept)
        for nbytes in fill(self._checkpoint, self._kept, cpu.threads()):
            progress(nbytes)
            left -= nbytes
        progress(left)

    def close(self) -> None:
        self._stream.ring.stop()

    def begin(self, logits: bool) -> None:
        """What is read ahead is what comes next: the head only where it is used."""
        of_layers = len(self._unit_of)
        self._stream.ring.go_round(of_layers + len(self._of_head) if logits or not of_layers else of_layers)

    @contextmanager
    def layer(self, index: int) -> Iterator[Parameters]:
        if index in self._whole:
            yield self._whole[index]
            return
        with self._stream.use(self._unit_of[index]) as streamed:
            yield layer_parameters(self._layers[index] | streamed)

    def staying(self, index: int) -> Parameters:
        """Those parameters of layer ``index`` that stay in memory."""
        return layer_parameters(self._layers[index])

    def _keep(self, group: Group, data: torch.Tensor) -> dict[str, Any]:
        self._kept.append((group, data))
        return {place.param.name: parameter(place, place.of(data), *self._settings) for place in group.places}


def _aligned(arena: Arena, nbytes: int) -> torch.Tensor:
    """Memory at a multiple of 4 KiB, for direct I/O. The arena itself begins at one."""
    arena.take(align(arena.used, ALIGNMENT) - arena.used)
    return arena.take(nbytes)
