"""Writes a model once in the formats that it is to run in: a folder from which loading is reading.

tightfit.safetensors holds a run of bytes for each group of parameters that are used together, in the order of use, as
:mod:`tightfit.checkpoints.compressed` describes. The folder is made beside its place, under a name that begins with a
dot, and gets its own when all of it is on the disk: whatever happens before leaves nothing there that would open.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tightfit.budget.units import format_bytes
from tightfit.catalog import spec_string
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.checkpoints.compressed import Compressed, StoredParam
from tightfit.checkpoints.layout import COMPRESSED, CONFIG, INDEX, SMALL_FILES
from tightfit.checkpoints.positioned import ALIGNMENT
from tightfit.checkpoints.safetensors_file import header_bytes
from tightfit.errors import FileError, UsageError
from tightfit.model.spec import ModelSpec
from tightfit.weights.placement.fill import fill
from tightfit.weights.placement.places import Group, Place, groups

Progress = Callable[[int], None]
TEMPORARY = ".part"


def layout(checkpoint: Checkpoint, spec: ModelSpec, weights: str) -> list[Group]:
    """Where everything lies in a folder with the matrices in ``weights`` (a spec string)."""
    return list(groups(checkpoint, spec, weights, dict.fromkeys(range(len(spec.layers)), weights)))


def check_target(out: Path, force: bool) -> None:
    """Raises UsageError if ``out`` may not be written: there is something, and not a compressed folder that ``force``
    allows to replace."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / COMPRESSED).is_file():
        raise UsageError(f"there is something else at {out}", "Name a folder that does not exist or is empty.")
    if not force:
        raise UsageError(f"{out} holds a compressed model already", "Add --force to replace it, or name another.")


def write(
    checkpoint: Checkpoint,
    weights: str,
    layout: list[Group],
    memory: torch.Tensor,
    out: Path,
    threads: int,
    force: bool = False,
    progress: Progress = lambda nbytes: None,
) -> None:
    """Reads, converts and writes the groups of ``layout`` one after the other; ``memory`` holds the largest.

    Raises FileError where ``out`` cannot be written, UsageError as :func:`check_target` does, CheckpointError for
    weights that cannot be read or converted.
    """
    check_target(out, force)
    header = header_bytes(
        {group.name: group.nbytes for group in layout}, _description(checkpoint, weights, layout).metadata(), ALIGNMENT
    )
    try:
        with _new_folder(out, force) as folder:
            _check_room(folder, out, len(header) + sum(group.nbytes for group in layout))
            with open(folder / COMPRESSED, "xb", buffering=0) as file:
                _write(file.fileno(), header)
                for group in layout:
                    data, left = memory[: group.nbytes].zero_(), group.nbytes
                    for nbytes in fill(checkpoint, [(group, data)], threads):
                        progress(nbytes)
                        left -= nbytes
                    _write(file.fileno(), data.numpy().data)
                    progress(left)  # of the padding
                os.fsync(file.fileno())
            with checkpoint.small_files() as source:
                _copy_small_files(source, folder)
    except OSError as error:
        raise FileError(
            f"{out} cannot be written: {error.strerror}", "Nothing was left there. Name a folder on another disk."
        ) from error


def _description(checkpoint: Checkpoint, weights: str, layout: list[Group]) -> Compressed:
    types = sorted({tensor.dtype for tensor in checkpoint.tensors.values()})
    described = {group.name: tuple(_stored(place) for place in group.places) for group in layout}
    return Compressed(weights, checkpoint.name, checkpoint.fingerprint, tuple(types), described)


def _stored(place: Place) -> StoredParam:
    param, name = place.param, "f32" if place.format is None else spec_string(place.format)
    return StoredParam(param.name, name, param.shape, param.experts, place.offset, place.nbytes, place.stride)


def _check_room(folder: Path, out: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise FileError(
            f"{out} would take {format_bytes(nbytes)}, and its disk has {format_bytes(free)} left",
            "Name a folder on another disk, or fewer bits with --weights.",
        )


def _write(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _copy_small_files(source: Path, folder: Path) -> None:
    """Everything but the weights; config.json, without which nothing opens, last."""
    patterns = [pattern for pattern in SMALL_FILES if pattern not in (CONFIG, INDEX)]
    for pattern in [*patterns, CONFIG]:
        for file in source.glob(pattern):
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
            _sync(copy)


@contextmanager
def _new_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder that becomes ``out`` at the end, or goes away with an error; so do those that killed processes left."""
    out = out.expanduser().resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{glob.escape(out.name)}.*{TEMPORARY}"):
        with _locked(left) as mine:
            if mine:
                shutil.rmtree(left, ignore_errors=True)
    folder = out.with_name(f".{out.name}.{os.getpid()}{TEMPORARY}")
    folder.mkdir()
    with _locked(folder):
        try:
            yield folder
            _sync(folder)
            _put(folder, out, force)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    _sync(out.parent)


def _put(folder: Path, out: Path, force: bool) -> None:
    """Gives ``folder`` its name. What has appeared there since is replaced only by ``force``, or if it is empty."""
    before = folder.with_name(f"{folder.name}.before{TEMPORARY}")
    if force and out.exists():
        out.rename(before)
    try:
        folder.rename(out)
    except OSError:
        if before.exists():
            before.rename(out)
        raise
    shutil.rmtree(before, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the folder's lock meanwhile; false if another process does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        yield mine
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
