"""The experts of a model in a cache: which of their matrices can stay on the disk, and how the decoder gets them."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from tightfit.budget.ledger import Arena, align
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.checkpoints.positioned import ALIGNMENT
from tightfit.experts.cache import ExpertCache, Key, Read
from tightfit.experts.census import read_census
from tightfit.experts.policy import scheme
from tightfit.model.spec import ModelSpec, MoeSpec
from tightfit.plan.schema import ActivationType, ExpertsPlan
from tightfit.weights.formats.base import Format
from tightfit.weights.placement.base import EXPERT_OBJECTS, OF_EXPERTS, Experts, Parameters, Placement
from tightfit.weights.placement.places import Group, Place, layer_name, read_place
from tightfit.weights.placement.readers import READERS, Piece, pieces
from tightfit.weights.placement.resident import Progress
from tightfit.weights.placement.streamed import OF_A_READER, Streamed, streamable

LEAST_SLOTS = 2  # one that is in use, one that is read
SCORED = 64  # tokens of a step whose scores a policy sees: the last ones


@dataclass(frozen=True)
class Laid:
    """A matrix of an expert, and its bytes in a slot."""

    name: str
    format: Format
    rows: int
    cols: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shelf:
    """How an expert lies in a slot of ``nbytes`` bytes: as in its group."""

    matrices: tuple[Laid, ...]
    nbytes: int

    @staticmethod
    def of(places: Sequence[Place]) -> Shelf:
        matrices: list[Laid] = []
        for place in places:
            assert place.format is not None
            name, (rows, cols) = place.param.name.removeprefix(OF_EXPERTS), place.param.shape
            matrices.append(Laid(name, place.format, rows, cols, place.offset - places[0].offset, place.nbytes))
        return Shelf(tuple(matrices), places[0].stride)

    def pieces(self, checkpoint: Checkpoint) -> list[Piece]:
        """What is read at once: of a compressed folder all of an expert, of others each matrix."""
        if checkpoint.compressed is not None:
            return pieces(self.nbytes)
        return [piece for laid in self.matrices for piece in pieces(laid.nbytes, start=laid.offset)]


class Slots:
    """Memory for experts, and the parameters of those that lie there."""

    def __init__(self, arena: Arena, count: int, nbytes: int, settings: tuple[torch.dtype, ActivationType]) -> None:
        self.buffers = [arena.take(nbytes) for _ in range(count)]
        self._settings = settings
        self._made: dict[int, tuple[Shelf, Parameters]] = {}

    def parameters(self, slot: int, shelf: Shelf) -> Parameters:
        """The matrices of an expert that lies in ``slot`` as ``shelf`` says."""
        made = self._made.get(slot)
        if made is None or made[0] is not shelf:
            data = self.buffers[slot]
            made = self._made[slot] = (
                shelf,
                Parameters(
                    {
                        laid.name: laid.format.matrix(
                            data[laid.offset : laid.offset + laid.nbytes], laid.rows, laid.cols, *self._settings
                        )
                        for laid in shelf.matrices
                    }
                ),
            )
        return made[1]


def on_disk(checkpoint: Checkpoint, group: Group) -> tuple[Group, tuple[Place, ...]]:
    """A layer's group without the matrices of experts that can stay on the disk, and those: all or none, the last ones
    of the group."""
    count = sum(place.param.experts > 0 and place.format is not None for place in group.places)
    kept, experts = group.places[: len(group.places) - count], group.places[len(group.places) - count :]
    if not count or not all(place.param.experts and streamable(checkpoint, place) for place in experts):
        return group, ()
    first = experts[0]  # the others lie between its copies, and each expert is one run of bytes
    if not all(place.stride == first.stride and first.offset <= place.offset < first.end for place in experts):
        return group, ()
    end = align(kept[-1].end, ALIGNMENT) if kept else 0
    return replace(group, places=kept, nbytes=min(end, group.nbytes)), experts


def slot_nbytes(layers: Sequence[Sequence[Place]]) -> int:
    """Bytes of a slot that an expert of any of ``layers`` fits into."""
    return max(Shelf.of(places).nbytes for places in layers if places)


def caching_nbytes(layers: Sequence[Sequence[Place]], slots: int) -> int:
    """What the ``experts`` account takes for ``slots`` slots."""
    return slots * (slot_nbytes(layers) + EXPERT_OBJECTS) + READERS * OF_A_READER


def expert_count(layers: Sequence[Sequence[Place]]) -> int:
    """How many experts there are in all."""
    return sum(places[0].param.experts for places in layers if places)


class CachedExperts(Placement):
    """``inner`` holds everything but the experts' matrices, which ``layers`` describe (empty for layers without); of
    those as many as ``plan`` has slots are in ``arena``.

    Raises CheckpointError where the plan calls for a census that there is not.
    """

    fixed = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        inner: Streamed,
        layers: Sequence[Sequence[Place]],
        arena: Arena,
        plan: ExpertsPlan,
        settings: tuple[torch.dtype, ActivationType],
    ) -> None:
        self._inner = inner
        self.model = inner.model
        indices = [index for index, places in enumerate(layers) if places]
        different = {shelf: shelf for shelf in (Shelf.of(layers[index]) for index in indices)}
        shelves = [different[Shelf.of(layers[index])] for index in indices]
        slots = self._slots = Slots(arena, plan.slots, slot_nbytes(layers), settings)
        mixtures = [mlp for mlp in (spec.layers[index].mlp for index in indices) if isinstance(mlp, MoeSpec)]
        most = max(moe.experts for moe in mixtures)
        how, census = scheme(plan.policy), None
        if how.policy.needs_census:
            census = read_census(checkpoint.name, checkpoint.fingerprint, len(mixtures), most)
        self._ranking = how.policy.ranking(len(mixtures), most, mixtures[0].experts_per_token, census)
        reader = expert_reader(checkpoint, [(layer_name(index), layers[index]) for index in indices], shelves)
        pieces_of = [shelf.pieces(checkpoint) for shelf in shelves]
        self._cache = ExpertCache(slots.buffers, pieces_of, reader, self._ranking, READERS)
        weakref.finalize(self, self._cache.stop)
        self._experts: dict[int, _OfLayer] = {}
        for mixture, (index, shelf) in enumerate(zip(indices, shelves, strict=True)):
            made = _OfLayer(self._cache, slots, mixture, mixtures[mixture], shelf, inner.staying(index).experts)
            if how.ahead and mixture + 1 < len(mixtures):
                made.following = mixtures[mixture + 1], inner.staying(indices[mixture + 1])
            self._experts[index] = made

    def load(self, progress: Progress = lambda nbytes: None) -> None:
        """Reads what stays, and the experts that are known to be worth it."""
        self._inner.load(progress)
        for slot in self._slots.buffers:  # else a disk that writes there would wait for each page
            slot.zero_()
        left = sum(map(len, self._slots.buffers))
        for nbytes in self._cache.fill(self._ranking.first(len(self._slots.buffers))):
            progress(nbytes)
            left -= nbytes
        progress(left)  # of slots that are filled when an expert is wanted
        self._cache.counts.clear()

    def close(self) -> None:
        self._cache.stop()
        self._inner.close()

    @contextmanager
    def layer(self, index: int) -> Iterator[Parameters]:
        with self._inner.layer(index) as parameters:
            parameters.experts = self._experts.get(index)
            yield parameters

    def begin(self, logits: bool) -> None:
        self._inner.begin(logits)

    @property
    def used_bytes(self) -> int:
        return self._inner.used_bytes + self._cache.counts["read"]

    @property
    def waited_seconds(self) -> float:
        return self._inner.waited_seconds + self._cache.waited

    @property
    def expert_counts(self) -> Counter[str]:
        return self._cache.counts


class _OfLayer(Experts):
    """The experts of one layer, which lie in slots as ``shelf`` says. ``others`` has their vectors, if they have
    some."""

    def __init__(
        self, cache: ExpertCache, slots: Slots, mixture: int, spec: MoeSpec, shelf: Shelf, others: Experts | None
    ) -> None:
        self._cache, self._slots, self._mixture, self._spec = cache, slots, mixture, spec
        self._shelf, self._others = shelf, others

    def want(self, experts: Mapping[int, int], scores: torch.Tensor) -> None:
        super().want(experts, scores)
        latest = scores[-SCORED:].double()
        if self._spec.scoring == "topk_softmax":
            latest = latest.softmax(-1)
        elif self._spec.scoring == "sigmoid":
            latest /= latest.sum(-1, keepdim=True)
        self._cache.want(self._mixture, list(experts), latest)

    def expect(self, experts: Sequence[int]) -> None:
        self._cache.expect(self._mixture + 1, experts)

    @contextmanager
    def use(self, expert: int) -> Iterator[Parameters]:
        with self._cache.use((self._mixture, expert)) as slot:
            matrices = self._slots.parameters(slot, self._shelf)
            if self._others is None:
                yield matrices
                return
            with self._others.use(expert) as vectors:
                yield Parameters(vectors | matrices)


def expert_reader(
    checkpoint: Checkpoint, layers: Sequence[tuple[str, Sequence[Place]]], shelves: Sequence[Shelf]
) -> Read:
    """What reads a piece of an expert of the i-th mixture, which has its group's name and places in ``layers[i]``."""

    def read(key: Key, piece: Piece, out: torch.Tensor) -> None:
        mixture, expert = key
        (group, places), matrices = layers[mixture], shelves[mixture].matrices
        if checkpoint.compressed is not None:
            begin = places[0].offset + expert * places[0].stride + piece.start
            checkpoint.read_into(checkpoint.tensors[group], begin, out.numpy().data)
            return
        which = bisect_right(matrices, piece.start, key=lambda laid: laid.offset) - 1
        read_place(checkpoint, group, places[which], expert, piece.start - matrices[which].offset, out)

    return read
