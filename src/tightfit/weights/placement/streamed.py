"""Streamed placement: of each layer some parameters stay in memory, and the others come from the disk when they are
needed, through a ring of buffers that is filled ahead of the computation.

After FlexGen (https://arxiv.org/abs/2303.06865), Superpipeline (https://arxiv.org/abs/2410.08791) and FlexInfer
(https://arxiv.org/abs/2503.03777): what stays is spread evenly over the layers, so that each waits for the disk
equally long. It departs from them in what it moves: what is left of a layer as it lies in the file, in a few large
requests.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from tightfit.budget.ledger import Arena, align
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.checkpoints.positioned import ALIGNMENT, REQUEST
from tightfit.kernels import cpu
from tightfit.model.spec import ModelSpec
from tightfit.plan.schema import ActivationType
from tightfit.weights.placement.base import Parameters, Placement, layer_parameters
from tightfit.weights.placement.fill import fill
from tightfit.weights.placement.places import EMBEDDINGS, HEAD, Group, Place, group_of
from tightfit.weights.placement.read import is_stored_as, read_bytes, tensor_of
from tightfit.weights.placement.readers import PIECE, READERS, Piece
from tightfit.weights.placement.resident import Progress, parameter
from tightfit.weights.placement.ring import Read, Ring
from tightfit.weights.placement.rows import RowsOnDisk, by_rows

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


def embeddings_on_disk(checkpoint: Checkpoint, spec: ModelSpec, group: Group) -> bool:
    """Whether the embeddings, ``group``, can stay on the disk: where the head is a matrix of its own."""
    return not spec.tied and all(by_rows(place) and streamable(checkpoint, place) for place in group.places)


def streaming_nbytes(outer: int, groups: Sequence[Group], resident: Sequence[int], buffers: int) -> int:
    """What the ``weights`` account takes where the first ``resident[i]`` places of each of ``groups`` stay, and
    ``outer`` bytes of what is outside of the layers."""
    kept = sum(align(cut_at(group, count)[0]) for group, count in zip(groups, resident, strict=True))
    largest = max(streamed_nbytes(group, count) for group, count in zip(groups, resident, strict=True))
    reading = buffers * align(largest, ALIGNMENT) + READERS * OF_A_READER if largest else 0
    return outer + kept + reading + ALIGNMENT


def spread(outer: int, groups: Sequence[Group], least: Sequence[int], buffers: int, room: int) -> list[int] | None:
    """How many of each layer's first places stay where the ``weights`` account may take ``room`` bytes: as much as
    fits, so that all layers have about as much to read. None if even ``least`` does not fit.

    Layers take turns in an order in which each first half of it is spread over all of them.
    """
    counts, best = list(least), None
    bits = (len(groups) - 1).bit_length()
    order = sorted(range(len(groups)), key=lambda index: f"{index:0{bits}b}"[::-1])
    while True:
        if streaming_nbytes(outer, groups, counts, buffers) <= room:
            best = counts.copy()
        left = [streamed_nbytes(group, count) for group, count in zip(groups, counts, strict=True)]
        most = max(left)
        if not most:
            return best
        counts[next(index for index in order if left[index] == most)] += 1


class Streamed(Placement):
    """The first ``resident[i]`` places of layer i stay in ``arena``, and the head; what is left of each layer goes
    through ``buffers`` buffers of the largest one's size. Embeddings stay too unless they are ``on_disk``.

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
        resident: Sequence[int],
        buffers: int,
        on_disk: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._settings = gemm_dtype, activations
        model: dict[str, object] = {}
        self._kept: list[tuple[Group, torch.Tensor]] = []
        for name in (EMBEDDINGS, HEAD):
            group = group_of(checkpoint, spec, name, outer)
            if name == EMBEDDINGS and on_disk:
                [place] = group.places
                model[place.param.name] = RowsOnDisk(checkpoint, group, place, self._settings)
                continue
            model |= self._keep(group, arena.take(group.nbytes))
        self.model = Parameters(model)

        self._fixed: list[Mapping[str, object]] = []
        self._rest: list[tuple[Group, int]] = []  # places that are streamed, and where in the group they begin
        for group, count in zip(layers, resident, strict=True):
            end, begin = cut_at(group, count)
            self._fixed.append(self._keep(Group(group.name, group.places[:count], end), arena.take(end)))
            self._rest.append((replace(group, places=group.places[count:]), begin))
        self._units = [index for index, (group, _) in enumerate(self._rest) if group.places]
        self._unit_of = {index: unit for unit, index in enumerate(self._units)}
        self._whole = {
            index: layer_parameters(fixed) for index, fixed in enumerate(self._fixed) if index not in self._unit_of
        }
        self._buffers: list[torch.Tensor] = []
        self._ring: Ring | None = None
        self._sizes = [self._rest[index][0].nbytes - self._rest[index][1] for index in self._units]
        if self._units:
            self._buffers = [_aligned(arena, max(self._sizes)) for _ in range(buffers)]
            self._ring = Ring(self._sizes, self._buffers, self._reader(), READERS, PIECE)
            weakref.finalize(self, self._ring.stop)

    def load(self, progress: Progress = lambda nbytes: None) -> None:
        """Reads what stays."""
        left = sum(group.nbytes for group, _ in self._kept)
        for nbytes in fill(self._checkpoint, self._kept, cpu.threads()):
            progress(nbytes)
            left -= nbytes
        progress(left)

    def close(self) -> None:
        if self._ring is not None:
            self._ring.stop()

    def staying(self, index: int) -> Parameters:
        """Those parameters of layer ``index`` that stay in memory."""
        return layer_parameters(self._fixed[index])

    @contextmanager
    def layer(self, index: int) -> Iterator[Parameters]:
        if self._ring is None or index in self._whole:
            yield self._whole[index]
            return
        unit = self._unit_of[index]
        with self._ring.use(unit) as buffer:
            self.used_bytes += self._sizes[unit]
            self.waited_seconds = self._ring.waited
            yield self._in(index, buffer)

    def _keep(self, group: Group, data: torch.Tensor) -> dict[str, object]:
        self._kept.append((group, data))
        return {place.param.name: parameter(place, place.of(data), *self._settings) for place in group.places}

    def _in(self, index: int, buffer: int) -> Parameters:
        """The parameters of a layer whose rest lies in a buffer. They are made for each use, which takes far less time
        than reading them: kept, those of a large model would take megabytes that no account holds."""
        group, begin = self._rest[index]
        made = dict(self._fixed[index])
        for place in group.places:
            moved = replace(place, offset=place.offset - begin)
            made[place.param.name] = parameter(place, moved.of(self._buffers[buffer]), *self._settings)
        return layer_parameters(made)

    def _reader(self) -> Read:
        """What reads a piece of a unit. It does not hold the placement, which ends the ring when it goes."""
        checkpoint, rest = self._checkpoint, [self._rest[index] for index in self._units]

        def read(unit: int, piece: Piece, out: torch.Tensor) -> None:
            group, begin = rest[unit]
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


def _aligned(arena: Arena, nbytes: int) -> torch.Tensor:
    """Memory at a multiple of 4 KiB, for direct I/O. The arena itself begins at one."""
    arena.take(align(arena.used, ALIGNMENT) - arena.used)
    return arena.take(nbytes)
