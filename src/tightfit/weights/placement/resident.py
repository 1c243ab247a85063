"""Resident placement: every parameter lies in one arena, converted while it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tightfit.budget.ledger import Arena
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.kernels import cpu
from tightfit.model.spec import ModelSpec
from tightfit.plan.schema import ActivationType
from tightfit.weights.formats.base import Format, Matrix
from tightfit.weights.placement.base import Parameters, Placement, layer_parameters
from tightfit.weights.placement.fill import fill
from tightfit.weights.placement.places import Group, Place, groups, layer_name

Progress = Callable[[int], None]


class ExpertMatrices:
    """The matrices of a mixture's experts over ``data`` (experts, bytes), each made when it is asked for."""

    def __init__(
        self,
        data: torch.Tensor,
        shape: tuple[int, ...],
        fmt: Format,
        gemm_dtype: torch.dtype,
        activations: ActivationType,
    ) -> None:
        self._data, self._format, self._gemm_dtype, self._activations = data, fmt, gemm_dtype, activations
        self._rows, self._cols = shape

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, expert: int) -> Matrix:
        return self._format.matrix(self._data[expert], self._rows, self._cols, self._gemm_dtype, self._activations)


class Resident(Placement):
    """Parameters at fixed places of ``arena``.

    ``formats`` are the spec strings of the layers that it holds, by their index, ``outer`` that of the embeddings and
    the head; :meth:`layer` counts the layers that it holds. The matrices exist from the start, over memory that nothing
    has written; :meth:`load` fills it.
    """

    fixed = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        outer: str,
        formats: Mapping[int, str],
        gemm_dtype: torch.dtype,
        arena: Arena,
        activations: ActivationType = "float32",
    ) -> None:
        self._checkpoint = checkpoint
        self._gemm_dtype, self._activations = gemm_dtype, activations
        self._parts = [(group, arena.take(group.nbytes)) for group in groups(checkpoint, spec, outer, formats)]
        made = {group.name: self._parameters(group, data) for group, data in self._parts}
        self._layers = [layer_parameters(made.pop(layer_name(index))) for index in formats]
        self.model = Parameters({name: value for group in made.values() for name, value in group.items()})

    @contextmanager
    def layer(self, index: int) -> Iterator[Parameters]:
        yield self._layers[index]

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group, _ in self._parts)

    def load(self, progress: Progress = lambda nbytes: None) -> None:
        """Reads and converts everything, with as much scratch beside the arena as
        :func:`~tightfit.weights.placement.fill.scratch_bytes` says."""
        left = self.nbytes
        for nbytes in fill(self._checkpoint, self._parts, cpu.threads()):
            progress(nbytes)
            left -= nbytes
        progress(left)  # of the padding between parameters, which nobody reads

    def _parameters(self, group: Group, data: torch.Tensor) -> dict[str, Any]:
        settings = self._gemm_dtype, self._activations
        return {place.param.name: parameter(place, place.of(data), *settings) for place in group.places}


def parameter(place: Place, data: torch.Tensor, gemm_dtype: torch.dtype, activations: ActivationType) -> Any:
    """What a placement hands out for a parameter over its bytes ``data`` (copies, bytes)."""
    if place.format is None:
        vectors = data.view(torch.float32)
        return vectors if place.param.experts else vectors[0]
    experts = ExpertMatrices(data, place.param.shape, place.format, gemm_dtype, activations)
    return experts if place.param.experts else experts[0]
