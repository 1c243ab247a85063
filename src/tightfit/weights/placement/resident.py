"""Resident placement: every parameter lies in one arena, converted while it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from tightfit.budget.ledger import Arena, align
from tightfit.catalog import parse
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.model.spec import ModelSpec, Param
from tightfit.plan.schema import OWN, ActivationType
from tightfit.weights.formats.base import Format, Matrix
from tightfit.weights.placement.base import Parameters, Placement
from tightfit.weights.placement.read import FORMAT_OF, blocks, is_plain, read_plain, tensor_of

Progress = Callable[[int], None]


def format_of(checkpoint: Checkpoint, param: Param, spec: str) -> Format:
    """The format in which ``param`` is stored where the plan says ``spec`` (a spec string, or ``own``)."""
    if spec == OWN or param.exact:
        spec = FORMAT_OF[tensor_of(checkpoint, param).dtype]
    [chosen] = parse("weights", spec)
    assert isinstance(chosen, Format)
    return chosen


def param_nbytes(checkpoint: Checkpoint, param: Param, spec: str) -> int:
    """Bytes that ``param`` takes in an arena."""
    copies = max(param.experts, 1)
    if not param.is_matrix:
        return align(copies * param.shape[0] * 4)
    return copies * align(format_of(checkpoint, param, spec).nbytes(*param.shape))


class Experts:
    """The matrices of a mixture's experts over ``data`` (experts, bytes), each made when it is asked for.

    A large mixture has tens of thousands of them: kept, they would take tens of megabytes that no account holds. Making
    one takes a few microseconds.
    """

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

    ``formats`` are the spec strings of the layers that it holds, ``outer`` that of the embeddings and the head. The
    matrices exist from the start, over memory that nothing has written; :meth:`load` fills it.
    """

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
        self._places: list[tuple[Param, torch.Tensor, Format | None]] = []  # the bytes: (experts or 1, bytes of one)
        self.model = Parameters({param.name: self._make(param, outer, arena) for param in spec.params})
        self._layers = {
            index: Parameters(
                {param.name: self._make(param, format_spec, arena) for param in spec.layers[index].params}
            )
            for index, format_spec in formats.items()
        }

    @contextmanager
    def layer(self, index: int) -> Iterator[Parameters]:
        yield self._layers[index]

    @property
    def nbytes(self) -> int:
        return sum(data.numel() for _, data, _ in self._places)

    def load(self, progress: Progress = lambda nbytes: None) -> None:
        """Reads and converts everything. Needs up to 5 MiB of scratch beside the arena."""
        for param, data, fmt in self._places:
            for expert, part in enumerate(data):
                if fmt is None:
                    self._load_vector(param, expert, part.view(torch.float32))
                else:
                    self._load_matrix(param, expert, part, fmt)
                progress(part.numel())

    def _make(self, param: Param, spec: str, arena: Arena) -> Any:
        copies = max(param.experts, 1)
        if not param.is_matrix:
            data = arena.take(copies * param.shape[0] * 4).view(copies, -1)
            self._places.append((param, data, None))
            vectors = data.view(torch.float32)
            return vectors if param.experts else vectors[0]
        fmt = format_of(self._checkpoint, param, spec)
        nbytes = fmt.nbytes(*param.shape)
        data = arena.take(copies * align(nbytes)).view(copies, -1)[:, :nbytes]
        self._places.append((param, data, fmt))
        experts = Experts(data, param.shape, fmt, self._gemm_dtype, self._activations)
        return experts if param.experts else experts[0]

    def _load_vector(self, param: Param, expert: int, out: torch.Tensor) -> None:
        for row, block in blocks(self._checkpoint, param, expert):
            out[row : row + len(block)] = block[:, 0]
        out.add_(param.add)

    def _load_matrix(self, param: Param, expert: int, data: torch.Tensor, fmt: Format) -> None:
        info = tensor_of(self._checkpoint, param, expert)
        if is_plain(param, info) and fmt.name == FORMAT_OF[info.dtype]:
            read_plain(self._checkpoint, param, expert, data)
            return
        for row, block in blocks(self._checkpoint, param, expert):
            fmt.encode(block, data, row)
