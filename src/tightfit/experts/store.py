"""The experts of a model in a cache: which of their matrices can stay on the disk, and how the decoder gets them."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from tightfit.budget.ledger import Arena, align
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.checkpoints.positioned import ALIGNMENT
from tightfit.experts.cache import ExpertCache, Key, Read
from tightfit.experts.census import read_census
from tightfit.experts.policy import scheme
from tightfit.model.spec import ModelSpec, MoeSpec
from tightfit.plan.schema import ActivationType, ExpertsPlan
from tightfit.weights.placement.base import OF_EXPERTS, Experts, Parameters, Placement
from tightfit.weights.placement.places import Group, Place, layer_name, read_place
from tightfit.weights.placement.readers import READERS, Piece, pieces
from tightfit.weights.placement.resident import Progress
from tightfit.weights.placement.streamed import OF_A_READER, Streamed, streamable

LEAST_SLOTS = 2  # one that is in use, one that is read
SCORED = 64  # tokens of a step whose scores a policy sees: the last ones


@dataclass(frozen=True)
class Shelf:
    """Where the matrices of an expert lie in a slot: each at a multiple of 4 KiB."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def of(places: Sequence[Place]) -> Shelf:
        offsets, end = [], 0
        for place in places:
            offsets.append(end)
            end = align(end + place.nbytes, ALIGNMENT)
        return Shelf(tuple(offsets), tuple(place.nbytes for place in places))

    @property
    def nbytes(self) -> int:
        return align(self.offsets[-1] + self.sizes[-1], ALIGNMENT)

    @property
    def pieces(self) -> list[Piece]:
        """Of each matrix its own, so that several threads read one expert."""
        return [
            piece for offset, size in zip(self.offsets, self.sizes, strict=True) for piece in pieces(size, start=offset)
        ]


def on_disk(checkpoint: Checkpoint, group: Group) -> tuple[Group, tuple[Place, ...]]:
    """A layer's group without the matrices of experts that can stay on the disk, and those: all or none, the last ones
    of the group."""
    count = sum(place.param.experts > 0 and place.format is not None for place in group.places)
    kept, experts = group.places[: len(group.places) - count], group.places[len(group.places) - count :]
    if not count or not all(place.param.experts and streamable(checkpoint, place) for place in experts):
        return group, ()
    end = align(kept[-1].end, ALIGNMENT) if kept else 0
    return replace(group, places=kept, nbytes=min(end, group.nbytes)), experts


def slot_nbytes(layers: Sequence[Sequence[Place]]) -> int:
    """Bytes of a slot that an expert of any of ``layers`` fits into."""
    return max(Shelf.of(places).nbytes for places in layers if places)


def caching_nbytes(layers: Sequence[Sequence[Place]], slots: int) -> int:
    """What the ``experts`` account takes for ``slots`` slots."""
    return slots * slot_nbytes(layers) + READERS * OF_A_READER


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
        self._inner, self._slots = inner, plan.slots
        self.model = inner.model
        indices = [index for index, places in enumerate(layers) if places]
        shelves = [Shelf.of(layers[index]) for index in indices]
        size = slot_nbytes(layers)
        buffers = [arena.take(size) for _ in range(plan.slots)]
        self._nbytes = plan.slots * size
        mixtures = [mlp for mlp in (spec.layers[index].mlp for index in indices) if isinstance(mlp, MoeSpec)]
        most = max(moe.experts for moe in mixtures)
        how, census = scheme(plan.policy), None
        if how.policy.needs_census:
            census = read_census(checkpoint.name, checkpoint.fingerprint, len(mixtures), most)
        self._ranking = how.policy.ranking(len(mixtures), most, mixtures[0].experts_per_token, census)
        reader = _reader(checkpoint, [(layer_name(index), layers[index]) for index in indices], shelves)
        self._cache = ExpertCache(buffers, [shelf.pieces for shelf in shelves], reader, self._ranking, READERS)
        weakref.finalize(self, self._cache.stop)
        self._experts: dict[int, _OfLayer] = {}
        for mixture, index in enumerate(indices):
            made = _OfLayer(self._cache, buffers, mixture, mixtures[mixture], layers[index], shelves[mixture], settings)
            made.others = inner.staying(index).experts
            if how.ahead and mixture + 1 < len(mixtures):
                made.following = mixtures[mixture + 1], inner.staying(indices[mixture + 1])
            self._experts[index] = made

    def load(self, progress: Progress = lambda nbytes: None) -> None:
        """Reads what stays, and the experts that are known to be worth it."""
        self._inner.load(progress)
        left = self._nbytes
        for nbytes in self._cache.fill(self._ranking.first(self._slots)):
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
        self.used_bytes = self._inner.used_bytes + self._cache.counts["read"]
        self.waited_seconds = self._inner.waited_seconds + self._cache.waited

    @property
    def expert_counts(self) -> Counter[str]:
        return self._cache.counts


class _OfLayer(Experts):
    """The experts of one layer. ``others`` has their vectors, where they have some."""

    others: Experts | None = None

    def __init__(
        self,
        cache: ExpertCache,
        buffers: Sequence[torch.Tensor],
        mixture: int,
        spec: MoeSpec,
        places: Sequence[Place],
        shelf: Shelf,
        settings: tuple[torch.dtype, ActivationType],
    ) -> None:
        self._cache, self._buffers, self._mixture, self._spec = cache, buffers, mixture, spec
        self._places, self._shelf, self._settings = places, shelf, settings

    def want(self, chosen: torch.Tensor, scores: torch.Tensor) -> None:
        super().want(chosen, scores)
        latest = scores[-SCORED:].double()
        if self._spec.scoring == "topk_softmax":
            latest = latest.softmax(-1)
        elif self._spec.scoring == "sigmoid":
            latest /= latest.sum(-1, keepdim=True)
        self._cache.want(self._mixture, chosen.unique().tolist(), latest)

    def expect(self, chosen: torch.Tensor) -> None:
        self._cache.expect(self._mixture + 1, chosen.unique().tolist())

    @contextmanager
    def use(self, expert: int) -> Iterator[Parameters]:
        if self.others is None:
            others: AbstractContextManager[Parameters] = nullcontext(Parameters({}))
        else:
            others = self.others.use(expert)
        with others as vectors, self._cache.use((self._mixture, expert)) as slot:
            yield Parameters(vectors | self._in(slot))

    def _in(self, slot: int) -> dict[str, Any]:
        """The matrices of the expert in a slot."""
        made = {}
        for place, offset, size in zip(self._places, self._shelf.offsets, self._shelf.sizes, strict=True):
            assert place.format is not None
            data = self._buffers[slot][offset : offset + size]
            name = place.param.name.removeprefix(OF_EXPERTS)
            rows, cols = place.param.shape
            made[name] = place.format.matrix(data, rows, cols, *self._settings)
        return made


def _reader(checkpoint: Checkpoint, layers: Sequence[tuple[str, Sequence[Place]]], shelves: Sequence[Shelf]) -> Read:
    """What reads a piece of an expert, which lies in one of its matrices."""

    def read(key: Key, piece: Piece, out: torch.Tensor) -> None:
        mixture, expert = key
        (group, places), offsets = layers[mixture], shelves[mixture].offsets
        which = bisect_right(offsets, piece.start) - 1
        read_place(checkpoint, group, places[which], expert, piece.start - offsets[which], out)

    return read
