"""The header of a safetensors file: which tensor lies where. The data is never mapped, read or written here.

Format: 8 bytes with the length of the header (little endian), the header (JSON), the data. The data is covered by the
tensors without overlaps and without holes. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from tightfit.checkpoints.files import DOWNLOAD_AGAIN
from tightfit.errors import CheckpointError

DTYPE_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_EXTENT, MAX_RANK = 1 << 48, 64  # beyond any tensor; they keep the arithmetic on a hostile header cheap


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. ``file`` is a name in the checkpoint's folder, ``offset`` and ``nbytes`` count its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The tensors of a file by name, and what its writer added (texts by name; empty for most files)."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, Any]


def read_header(stream: BinaryIO, size: int, file: str, where: str) -> Header:
    """The header of a safetensors file of ``size`` bytes, read from the start of ``stream``.

    ``stream`` need not hold more than the header. ``file`` goes into each TensorInfo, ``where`` into messages.
    Raises CheckpointError where the file is truncated, is something else, or contradicts itself.
    """
    prefix = stream.read(8)
    if prefix == b"version ":  # "version https://git-lfs.github.com/spec/v1"
        raise CheckpointError(f"{where} is a Git LFS pointer, not the weights", "Fetch the weights with: git lfs pull")
    if len(prefix) < 8:
        raise CheckpointError(f"{where} is truncated: expected at least 8 bytes, found {len(prefix)}", DOWNLOAD_AGAIN)
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{where} is not a safetensors file: its header would have {length} bytes", DOWNLOAD_AGAIN
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{where} is truncated: expected at least {8 + length} bytes for the header, found {size}", DOWNLOAD_AGAIN
        )
    header = _parse(stream.read(length), length, where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"the '__metadata__' of {where} is not an object", DOWNLOAD_AGAIN)
    tensors = [_tensor(name, entry, 8 + length, file, where) for name, entry in header.items()]
    _check_cover(tensors, 8 + length, size, where)
    return Header({tensor.name: tensor for tensor in tensors}, metadata)


def header_bytes(sizes: Mapping[str, int], metadata: Mapping[str, str], alignment: int) -> bytes:
    """The beginning of a file of byte tensors (U8) with ``sizes`` in bytes, which follow one after the other; a
    multiple of ``alignment`` long."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, nbytes in sizes.items():
        header[name] = {"dtype": "U8", "shape": [nbytes], "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return struct.pack("<Q", len(text)) + text


def _parse(content: bytes, length: int, where: str) -> dict[str, Any]:
    if len(content) < length:
        raise CheckpointError(
            f"{where} is truncated: expected a header of {length} bytes, found {len(content)}", DOWNLOAD_AGAIN
        )
    try:
        header = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header of {where} is not valid JSON: {error}", DOWNLOAD_AGAIN) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {where} is not a JSON object", DOWNLOAD_AGAIN)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:  # the format forbids it: readers would disagree on which one counts
            raise ValueError(f"'{name}' appears twice")
        entries[name] = value
    return entries


def _tensor(name: str, entry: Any, data: int, file: str, where: str) -> TensorInfo:
    """The entry of one tensor, checked in itself; ``data`` is where the data starts in the file."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"the header of {where} gives tensor '{name}' as {str(entry)[:80]}, expected dtype, shape and data_offsets",
            DOWNLOAD_AGAIN,
        ) from error
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"tensor '{name}' in {where} has the unknown dtype {dtype!r}", f"Known are: {', '.join(DTYPE_BITS)}."
        )
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_RANK
        or not all(type(extent) is int and 0 <= extent <= MAX_EXTENT for extent in shape)
    ):
        raise CheckpointError(f"tensor '{name}' in {where} has the shape {str(shape)[:80]}", DOWNLOAD_AGAIN)
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise CheckpointError(f"tensor '{name}' in {where} has the offsets [{begin!r}, {end!r}]", DOWNLOAD_AGAIN)
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise CheckpointError(
            f"tensor '{name}' in {where} of {dtype} {shape}: expected {-(-bits // 8)} bytes, found {end - begin}",
            DOWNLOAD_AGAIN,
        )
    return TensorInfo(name, dtype, tuple(shape), file, data + begin, end - begin)


def _check_cover(tensors: list[TensorInfo], data: int, size: int, where: str) -> None:
    """The tensors cover the bytes [data, size) of the file, each byte once."""
    end = data
    previous = ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset < end:
            raise CheckpointError(f"tensors '{previous}' and '{tensor.name}' in {where} overlap", DOWNLOAD_AGAIN)
        if tensor.offset > end:
            raise CheckpointError(
                f"{where} has {tensor.offset - end} bytes before tensor '{tensor.name}' that no tensor owns",
                DOWNLOAD_AGAIN,
            )
        end, previous = tensor.offset + tensor.nbytes, tensor.name
    if end != size:
        problem = "is truncated" if size < end else "is too long"
        raise CheckpointError(f"{where} {problem}: expected {end} bytes, found {size}", DOWNLOAD_AGAIN)
