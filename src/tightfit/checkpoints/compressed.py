"""What a compressed folder says of itself: which parameter lies where, and in which format.

`tightfit compress` writes one file, tightfit.safetensors. It has a tensor of bytes for each group of parameters that
are used together (``embeddings``, ``layers.0``, ..., ``head``), in the order of use, each a multiple of 4 KiB long and
at such a place of the file, and holding exactly what memory holds. The header's metadata describe them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tightfit.checkpoints.config import Config
from tightfit.checkpoints.layout import COMPRESSED
from tightfit.checkpoints.positioned import ALIGNMENT
from tightfit.checkpoints.safetensors_file import TensorInfo
from tightfit.errors import CheckpointError

VERSION = 1
KEY = "tightfit"  # of the metadata, whose values are texts: a JSON object
AGAIN = "Write it again with `tightfit compress`."


@dataclass(frozen=True)
class StoredParam:
    """A parameter of a group: ``max(experts, 1)`` copies of ``shape`` in ``format`` (a spec string), each ``nbytes``
    long, the first at byte ``offset`` of the group and the others ``stride`` bytes apart. Between two copies may be
    those of other parameters of the same ``stride``."""

    name: str
    format: str
    shape: tuple[int, ...]
    experts: int
    offset: int
    nbytes: int
    stride: int

    @property
    def end(self) -> int:
        return self.offset + (max(self.experts, 1) - 1) * self.stride + self.nbytes


@dataclass(frozen=True)
class Compressed:
    """How a model was compressed: with ``weights`` (a spec string), from the checkpoint ``source`` with its
    ``fingerprint`` and the ``types`` of its tensors."""

    weights: str
    source: str
    fingerprint: str
    types: tuple[str, ...]
    groups: Mapping[str, tuple[StoredParam, ...]]

    def metadata(self) -> dict[str, str]:
        """For the file's header."""
        return {"format": KEY, KEY: json.dumps({"version": VERSION} | asdict(self), separators=(",", ":"))}


def read_compressed(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], name: str) -> Compressed:
    """The description in a header, checked against the tensors of its file. Raises CheckpointError."""
    try:
        values = json.loads(metadata[KEY])
        if not isinstance(values, dict):
            raise ValueError("no object")
    except (KeyError, TypeError, ValueError, RecursionError):
        raise CheckpointError(f"{COMPRESSED} of {name} does not say how it was compressed", AGAIN) from None
    if values.get("version") != VERSION:
        raise CheckpointError(
            f"{name} was compressed by another version of tightfit: its layout is version {values.get('version')!r}, "
            f"and this one reads {VERSION}",
            "Compress the model again, or install the tightfit that wrote it.",
        )
    header = Config(values, name, f"the header of {COMPRESSED}")
    groups = header.section("groups")
    if groups.values.keys() != tensors.keys():
        raise CheckpointError(f"{COMPRESSED} of {name} describes other tensors than it holds", AGAIN)
    return Compressed(
        header.string("weights"),
        header.string("source"),
        header.string("fingerprint"),
        header.strings("types"),
        {group: _group(groups, group, tensors[group], name) for group in groups.values},
    )


def _group(groups: Config, group: str, tensor: TensorInfo, name: str) -> tuple[StoredParam, ...]:
    entries = groups.get(group)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise groups.wrong(group, "a list of parameters")
    params = [_param(Config(entry, name, f"'{group}' in {groups.file}")) for entry in entries]
    end, first_end = 0, 0  # of what came before: of all copies, and of the first one
    bundle: StoredParam | None = None  # the first of parameters whose copies take turns
    for param in sorted(params, key=lambda param: param.offset):
        if bundle is not None and param.offset < bundle.end and param.stride == bundle.stride:
            room = bundle.offset + bundle.stride  # where the bundle's second copy begins
            overlaps = param.offset < first_end or param.offset + param.nbytes > room or param.experts != bundle.experts
        else:
            overlaps, bundle = param.offset < end, param
        if overlaps or param.offset % 64 or param.stride < param.nbytes:
            raise CheckpointError(f"'{param.name}' in '{group}' of {name} overlaps what is before it", AGAIN)
        first_end, end = param.offset + param.nbytes, param.end
    if tensor.dtype != "U8" or tensor.nbytes < end or tensor.nbytes % ALIGNMENT or tensor.offset % ALIGNMENT:
        raise CheckpointError(f"tensor '{group}' of {name} is not the run of bytes that its header describes", AGAIN)
    return tuple(params)


def _param(entry: Config) -> StoredParam:
    return StoredParam(
        entry.string("name"),
        entry.string("format"),
        entry.integers("shape"),
        entry.integer("experts", minimum=0),
        *(entry.integer(key, minimum=0, maximum=1 << 48) for key in ("offset", "nbytes", "stride")),
    )
