"""Where every parameter lies: in groups that are used one after the other (the embeddings, each layer, the head), each
group one run of bytes, the same in memory and in a compressed folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from tightfit.budget.ledger import align
from tightfit.catalog import parse_one
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.checkpoints.compressed import ALIGNMENT, StoredParam
from tightfit.checkpoints.layout import COMPRESSED
from tightfit.errors import CheckpointError, UsageError
from tightfit.model.spec import ModelSpec, Param
from tightfit.plan.schema import OWN
from tightfit.weights.formats.base import Format
from tightfit.weights.placement import read

if TYPE_CHECKING:
    import torch

EMBEDDINGS, HEAD = "embeddings", "head"


@dataclass(frozen=True)
class Place:
    """The bytes of one parameter in its group: one copy, or one for each expert, ``stride`` apart from ``offset`` on.

    ``format`` is that of a matrix; vectors are float32, which None stands for.
    """

    param: Param
    format: Format | None
    offset: int
    nbytes: int  # of one copy
    stride: int

    @property
    def copies(self) -> int:
        return max(self.param.experts, 1)

    @property
    def end(self) -> int:
        return self.offset + self.copies * self.stride

    def of(self, group: torch.Tensor) -> torch.Tensor:
        """(copies, nbytes) of the group's bytes."""
        return group[self.offset : self.end].view(self.copies, self.stride)[:, : self.nbytes]


@dataclass(frozen=True)
class Group:
    """Parameters that are used together; ``nbytes`` is a multiple of 4 KiB."""

    name: str
    places: tuple[Place, ...]
    nbytes: int


def layer_name(index: int) -> str:
    return f"layers.{index}"


def params_of(spec: ModelSpec) -> dict[str, Sequence[Param]]:
    """The parameters of each group, in the order of use."""
    layers = {layer_name(index): layer.params for index, layer in enumerate(spec.layers)}
    embeddings = [param for param in spec.params if param.name == "embed_tokens"]
    return {EMBEDDINGS: embeddings} | layers | {HEAD: [param for param in spec.params if param not in embeddings]}


def format_of(checkpoint: Checkpoint, param: Param, spec: str) -> Format:
    """The format in which ``param`` is stored where the plan says ``spec`` (a spec string, or ``own``)."""
    if spec == OWN or param.exact:
        spec = read.FORMAT_OF[read.tensor_of(checkpoint, param).dtype]
    return _format(spec)


def group_of(checkpoint: Checkpoint, name: str, params: Sequence[Param], spec: str) -> Group:
    """``params`` one after the other, the matrices in the format that the spec string says; or, of a compressed folder,
    as it has them."""
    if checkpoint.compressed is not None:
        stored = {param.name: param for param in checkpoint.compressed.groups[name]}
        places = [_stored_place(param, stored[param.name]) for param in params]
        return Group(name, tuple(places), checkpoint.tensors[name].nbytes)
    places, offset = [], 0
    for param in params:
        fmt = format_of(checkpoint, param, spec) if param.is_matrix else None
        nbytes = _nbytes(param, fmt)
        places.append(Place(param, fmt, offset, nbytes, nbytes if fmt is None else align(nbytes)))
        offset = align(places[-1].end)
    return Group(name, tuple(places), align(offset, ALIGNMENT))


def groups(checkpoint: Checkpoint, spec: ModelSpec, outer: str, formats: Mapping[int, str]) -> Iterator[Group]:
    """All groups in the order of use; of the layers those that ``formats`` has, by their index."""
    formats_of = {EMBEDDINGS: outer, HEAD: outer} | {layer_name(index): fmt for index, fmt in formats.items()}
    for name, params in params_of(spec).items():
        if name in formats_of:
            yield group_of(checkpoint, name, params, formats_of[name])


def check(checkpoint: Checkpoint, spec: ModelSpec) -> None:
    """Raises CheckpointError unless the checkpoint has every parameter of ``spec`` in its shape, and nothing more."""
    if checkpoint.compressed is None:
        read.check(checkpoint, spec)
        return
    expected, found = params_of(spec), checkpoint.compressed.groups
    if found.keys() != expected.keys():
        layers = sum(name not in (EMBEDDINGS, HEAD) for name in found)
        raise _mismatch(checkpoint, f"it has {layers} layers, and that describes {len(spec.layers)}")
    for group, params in expected.items():
        stored = {param.name: param for param in found[group]}
        for param in params:
            if param.name not in stored:
                raise _mismatch(checkpoint, f"'{group}' has no {param.name}")
            _check_stored(checkpoint, param, stored.pop(param.name))
        if stored:
            raise _mismatch(checkpoint, f"'{group}' has {', '.join(stored)}, which that does not describe")


def _check_stored(checkpoint: Checkpoint, param: Param, stored: StoredParam) -> None:
    if (stored.shape, stored.experts) != (param.shape, param.experts):
        raise _mismatch(checkpoint, f"{param.name} is {list(stored.shape)}, and that asks for {list(param.shape)}")
    try:
        place = _stored_place(param, stored)
    except UsageError as error:
        raise CheckpointError(
            f"{checkpoint.name} keeps {param.name} as '{stored.format}': {error.message}",
            "Install the tightfit that wrote it, or compress the model again.",
        ) from error
    if place.nbytes != _nbytes(param, place.format):
        raise _mismatch(checkpoint, f"{param.name} has {place.nbytes} bytes, which is not {stored.format}")


def _mismatch(checkpoint: Checkpoint, what: str) -> CheckpointError:
    return CheckpointError(
        f"{COMPRESSED} of {checkpoint.name} does not belong to its config.json: {what}",
        "One of the two was changed: compress the model again.",
    )


def _stored_place(param: Param, stored: StoredParam) -> Place:
    fmt = _format(stored.format) if param.is_matrix else None
    return Place(param, fmt, stored.offset, stored.nbytes, stored.stride)


def _nbytes(param: Param, fmt: Format | None) -> int:
    return param.shape[0] * 4 if fmt is None else fmt.nbytes(*param.shape)


@cache
def _format(spec: str) -> Format:
    chosen = parse_one("weights", spec)
    assert isinstance(chosen, Format)
    return chosen
