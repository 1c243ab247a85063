"""Where every parameter lies: in groups that are used one after the other (the embeddings, each layer, the head), each
group one run of bytes, the same in memory and in a compressed folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from tightfit.budget.ledger import align
from tightfit.catalog import parse_one
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.checkpoints.compressed import StoredParam
from tightfit.checkpoints.layout import COMPRESSED
from tightfit.checkpoints.positioned import ALIGNMENT
from tightfit.errors import CheckpointError, UsageError
from tightfit.model.spec import ModelSpec, Param
from tightfit.plan.schema import OWN
from tightfit.weights.formats.base import Format, Scheme
from tightfit.weights.placement import read

if TYPE_CHECKING:
    import torch

EMBEDDINGS, LAYER, HEAD = "embeddings", "layers.", "head"
OF_EXPERTS = 3  # the rank of experts' matrices in a group: the last


@dataclass(frozen=True)
class Place:
    """The bytes of one parameter in its group: one copy, or one for each expert, ``stride`` apart from ``offset`` on.
    The matrices of an expert lie side by side: each of them is one run of bytes, of a ``stride`` of 4 KiB.

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
        return self.offset + (self.copies - 1) * self.stride + self.nbytes

    def of(self, group: torch.Tensor) -> torch.Tensor:
        """(copies, nbytes) of the group's bytes."""
        return group[self.offset : self.end].as_strided((self.copies, self.nbytes), (self.stride, 1))


@dataclass(frozen=True)
class Group:
    """Parameters that are used together; ``nbytes`` is a multiple of 4 KiB."""

    name: str
    places: tuple[Place, ...]
    nbytes: int


def layer_name(index: int) -> str:
    return f"{LAYER}{index}"


def params_of(spec: ModelSpec) -> dict[str, tuple[Param, ...]]:
    """The parameters of each group, in the order of use."""
    layers = {layer_name(index): layer.params for index, layer in enumerate(spec.layers)}
    embeddings = tuple(param for param in spec.params if param.name == "embed_tokens")
    head = tuple(param for param in spec.params if param.name != "embed_tokens")
    return {EMBEDDINGS: embeddings} | layers | {HEAD: head}


def group_of(checkpoint: Checkpoint, spec: ModelSpec, name: str, stored_as: str) -> Group:
    """The parameters of a group one after the other, the matrices ``stored_as`` says (a spec string, or ``own``); or,
    of a compressed folder, as it has them."""
    params = sorted(params_of(spec)[name], key=_rank)
    if checkpoint.compressed is not None:
        stored = {param.name: param for param in checkpoint.compressed.groups[name]}
        found = sorted((_stored_place(param, stored[param.name]) for param in params), key=lambda place: place.offset)
        return Group(name, tuple(found), checkpoint.tensors[name].nbytes)
    layer = None if name in (EMBEDDINGS, HEAD) else int(name.removeprefix(LAYER))
    places: list[Place] = []
    end = 0
    for param in params:
        fmt = _format_of(checkpoint, param, stored_as, layer, len(spec.layers)) if param.is_matrix else None
        size = _nbytes(param, fmt)
        if _rank(param) == OF_EXPERTS and (not places or _rank(places[-1].param) != OF_EXPERTS):
            end = align(end, ALIGNMENT)  # the first expert's matrices begin here
        places.append(Place(param, fmt, align(end), size, size))
        end = places[-1].end if _rank(param) != OF_EXPERTS else align(end) + size
    bundle = [place for place in places if _rank(place.param) == OF_EXPERTS]
    if bundle:
        stride = align(end, ALIGNMENT) - bundle[0].offset
        places[-len(bundle) :] = [replace(place, stride=stride) for place in bundle]
        end = places[-1].end
    return Group(name, tuple(places), align(end, ALIGNMENT))


def read_place(
    checkpoint: Checkpoint, group: str, place: Place, expert: int, start: int, out: torch.Tensor, again: bool = False
) -> None:
    """Fills ``out`` (uint8) with the bytes from ``start`` on of one copy of a parameter that the file has as it is
    used. ``again`` is as in :meth:`~tightfit.checkpoints.checkpoint.Checkpoint.read_into`."""
    if checkpoint.compressed is not None:
        begin = place.offset + expert * place.stride + start
        checkpoint.read_into(checkpoint.tensors[group], begin, out.numpy().data, again)
    else:
        read.read_bytes(checkpoint, place.param, expert, start, out, again)


def groups(checkpoint: Checkpoint, spec: ModelSpec, outer: str, layers: Mapping[int, str]) -> Iterator[Group]:
    """All groups in the order of use, the embeddings and the head stored as ``outer`` says; of the layers those that
    ``layers`` has, by their index."""
    stored_as = {EMBEDDINGS: outer, HEAD: outer} | {layer_name(index): spec for index, spec in layers.items()}
    for name in params_of(spec):
        if name in stored_as:
            yield group_of(checkpoint, spec, name, stored_as[name])


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


def _rank(param: Param) -> int:
    """The order within a group, of which the last ones may stay on the disk. Vectors first: they are small, and
    converted when they are read. Then routers, which are asked before their turn. Experts last: they are wanted one by
    one."""
    if not param.is_matrix:
        return 0
    return OF_EXPERTS if param.experts else 1 if param.exact else 2


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
    fmt = _scheme(stored.format).of(param.name, None, 0) if param.is_matrix else None
    return Place(param, fmt, stored.offset, stored.nbytes, stored.stride)


def _nbytes(param: Param, fmt: Format | None) -> int:
    """Bytes of one copy."""
    return param.shape[0] * 4 if fmt is None else fmt.nbytes(*param.shape)


def _format_of(checkpoint: Checkpoint, param: Param, stored_as: str, layer: int | None, layers: int) -> Format:
    if stored_as == OWN or param.exact:
        stored_as = read.FORMAT_OF[read.tensor_of(checkpoint, param).dtype]
    return _scheme(stored_as).of(param.name, layer, layers)


@cache
def _scheme(spec: str) -> Scheme:
    chosen = parse_one("weights", spec)
    assert isinstance(chosen, Scheme)
    return chosen
