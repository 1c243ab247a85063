"""Measurements of this machine: how fast memory and disk are read, what an engine's imports hold resident, and how fast
the engine's kernels run (:mod:`tightfit.plan.probe`).

All but the last take about two seconds and say what they measured: a number from a buffer that fits in the processor's
cache is not a memory bandwidth. The last takes a quarter of a minute, in a process of its own, and is kept in the
record of the machine with the version of its form; what does not pass its checks is measured again.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit import child
from tightfit.budget.machine import MachineRecord
from tightfit.budget.meter import ResidentSet, available_memory
from tightfit.budget.mounts import MEMORY_FILESYSTEMS, mounts
from tightfit.budget.units import KiB, MiB
from tightfit.errors import TightfitError, UsageError
from tightfit.plan.schema import Numerics
from tightfit.plan.speeds import Speeds, device_of, known_speeds, speeds_key

BLOCK = 4 * MiB
ENGINE_IMPORTS = ("torch", "safetensors", "tokenizers", "jinja2", "pydantic")
# Where the operating system does not tell the size of the last-level cache: that of a large desktop processor.
USUAL_CACHE = 64 * MiB
SMALLEST_FILE = 128 * MiB  # that a disk is measured with as streaming reads it


@dataclass(frozen=True)
class MemoryBandwidth:
    """Reading ``buffer_bytes`` with ``threads`` threads, the fastest of ``passes``.

    ``cache_bytes`` is the size of the last-level cache: with a buffer that is not larger this is the cache's bandwidth.
    """

    bytes_per_s: float
    threads: int
    buffer_bytes: int
    cache_bytes: int
    passes: int


@dataclass(frozen=True)
class DiskBandwidth:
    """Reading ``read_bytes`` in order in blocks of 4 MiB.

    ``method`` is ``direct`` where the page cache was bypassed, ``fadvise`` where it was asked to forget the file before
    (which it need not do), and ``cached`` where neither is possible. ``device`` is ``major:minor``.
    """

    bytes_per_s: float
    read_bytes: int
    method: str
    device: str
    filesystem: str


def last_level_cache(root: Path = Path("/")) -> int | None:
    """Bytes of last-level cache of all processors together, or None where the operating system does not tell."""
    caches: dict[tuple[int, str], int] = {}  # (level, which processors share it) -> bytes
    for index in root.glob("sys/devices/system/cpu/cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, shared, size = ((index / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
        except OSError:
            continue
        if size.endswith("K") and size[:-1].isdigit():
            caches[int(level), shared] = int(size[:-1]) * KiB
    last = max((level for level, _ in caches), default=None)
    return sum(size for (level, _), size in caches.items() if level == last) or None


def measure_bandwidth(threads: int, buffer_bytes: int | None = None, seconds: float = 2.0) -> MemoryBandwidth:
    """The bandwidth of reading memory.

    The buffer is four times the last-level cache, so that little of it is there from the pass before, but at most a
    quarter of what is available, and what can be written in half of ``seconds``.
    """
    import numpy as np

    cache = last_level_cache() or USUAL_CACHE
    wanted = buffer_bytes or min(4 * cache, available_memory() // 4)
    each = max(wanted // threads // BLOCK, 1) * BLOCK
    buffers = [np.empty(each // 4, dtype=np.int32) for _ in range(threads)]
    step = BLOCK // 4

    def fill(buffer: np.ndarray) -> np.ndarray:
        # Unwritten pages are all the same page of zeros. Each thread writes what it will read: its memory is then near.
        until = time.perf_counter() + seconds / 2
        for start in range(0, buffer.size, step):
            buffer[start : start + step] = 1
            if time.perf_counter() > until:
                return buffer[: start + step]
        return buffer

    with ThreadPoolExecutor(threads) as pool:
        filled = list(pool.map(fill, buffers))
        nbytes = sum(buffer.nbytes for buffer in filled)
        times: list[float] = []
        until = time.perf_counter() + seconds / 2
        while not times or time.perf_counter() < until:
            start = time.perf_counter()
            # A maximum is the simplest reduction that numpy vectorises; it lets other threads run meanwhile.
            list(pool.map(np.max, filled))
            times.append(time.perf_counter() - start)
    return MemoryBandwidth(nbytes / min(times), threads, nbytes, cache, len(times))


def measure_disk(path: Path, seconds: float = 1.5, file_bytes: int = 256 * MiB) -> DiskBandwidth:
    """The bandwidth of reading the file at ``path``, or a file of ``file_bytes`` written for it in the folder ``path``.

    Writing takes ``seconds`` at most, and so does reading. Raises UsageError for what is not there, cannot be read or
    written, is too small to tell, or lies in memory.
    """
    try:
        device, filesystem = _device(path)
        if filesystem in MEMORY_FILESYSTEMS:
            raise UsageError(f"{path} is on a {filesystem}, which is memory and not a disk.", "Name a path on a disk.")
        if path.is_dir():
            with _written_file(path, file_bytes, seconds) as file:
                method, nbytes, elapsed = _read_uncached(file, seconds)
        else:
            method, nbytes, elapsed = _read_uncached(path, seconds)
    except OSError as error:
        raise UsageError(
            f"The disk under {path} cannot be measured: {error.strerror or error}.",
            "Name a file of at least 4 MiB that can be read, or a folder that can be written.",
        ) from error
    if nbytes == 0:
        raise UsageError(f"{path} is too small to measure a disk with.", "Name a file of at least 4 MiB.")
    return DiskBandwidth(nbytes / elapsed, nbytes, method, device, filesystem)


def _read_uncached(file: Path, seconds: float) -> tuple[str, int, float]:
    """(how, bytes, seconds) of reading whole blocks of ``file`` in order."""
    if hasattr(os, "O_DIRECT"):
        try:
            return "direct", *_read(os.open(file, os.O_RDONLY | os.O_DIRECT), seconds)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a file system without direct I/O answers
                raise
    handle = os.open(file, os.O_RDONLY)
    if not hasattr(os, "posix_fadvise"):
        return "cached", *_read(handle, seconds)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    return "fadvise", *_read(handle, seconds)


def _read(handle: int, seconds: float) -> tuple[int, float]:
    """(bytes, seconds) of reading from ``handle``, which is closed."""
    # Direct reads need an aligned buffer, which a mapping is. It is written first: page faults are not the disk's.
    with os.fdopen(handle, "rb", buffering=0) as stream, mmap.mmap(-1, BLOCK) as block:
        block.write(bytes(BLOCK))
        done, elapsed = 0, 0.0
        start = time.perf_counter()
        while elapsed < seconds and stream.readinto(block) == BLOCK:
            done += BLOCK
            elapsed = time.perf_counter() - start
        return done, elapsed


@contextmanager
def _written_file(folder: Path, nbytes: int, seconds: float) -> Iterator[Path]:
    """A temporary file of ``nbytes``, or of what can be written in ``seconds``, that is on the disk."""
    block = os.urandom(BLOCK)  # zeros might be compressed away
    with tempfile.NamedTemporaryFile(dir=folder, prefix="tightfit-", suffix=".part") as file:
        until = time.perf_counter() + seconds
        for _ in range(max(nbytes // BLOCK, 1)):
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            if time.perf_counter() > until:
                break
        yield Path(file.name)


def _device(path: Path) -> tuple[str, str]:
    """(``major:minor``, name of the file system) of ``path``."""
    places = [
        (len(mount.point.parts), mount.filesystem) for mount in mounts() if path.resolve().is_relative_to(mount.point)
    ]
    return device_of(path), max(places, key=lambda place: place[0])[1] if places else "unknown"


def measure_runtime(imports: Sequence[str] = ENGINE_IMPORTS) -> ResidentSet:
    """The resident set of a process that has tuned its allocator and imported ``imports``, in bytes.

    It is measured in a child process, so that nothing of this one counts.
    """
    code = f"""
import dataclasses, importlib, json
from tightfit.budget.malloc import tune_malloc
tune_malloc()
for name in {tuple(imports)!r}:
    importlib.import_module(name)
from tightfit.budget.meter import resident_set
print(json.dumps(dataclasses.asdict(resident_set())))
"""
    done = subprocess.run(child.command(code), env=child.environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise TightfitError(
            f"A child process to measure the runtime failed with status {done.returncode}.", done.stderr.strip()
        )
    return ResidentSet(**json.loads(done.stdout))


def measured_speeds(
    record: MachineRecord,
    threads: int,
    numerics: Numerics,
    file: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    again: bool = False,
) -> Speeds:
    """As :func:`known_speeds`, measured where they are not known, or ``again``, and kept. The disk is measured where
    ``file`` is large enough to tell."""
    known = None if again else known_speeds(record, threads, numerics, file)
    disk = file if _lacks_disk(known, file) else None
    if known is None or disk is not None:
        asked = {"threads": threads, "numerics": numerics.model_dump(), "wanted": known is None}
        answer = child.ask("tightfit.plan.probe:answer", asked | {"file": disk and str(disk)}, progress)
        if answer["speeds"] is not None:
            record.speeds[speeds_key(threads, numerics)] = answer["speeds"]
        if disk is not None:
            record.disks[device_of(disk)] = answer["disk"]
        record.save()
    found = known_speeds(record, threads, numerics, file)
    assert found is not None
    return found


def is_measured(record: MachineRecord, threads: int, numerics: Numerics, file: Path | None = None) -> bool:
    """Whether :func:`measured_speeds` has nothing to measure."""
    known = known_speeds(record, threads, numerics, file)
    return known is not None and not _lacks_disk(known, file)


def _lacks_disk(known: Speeds | None, file: Path | None) -> bool:
    """Whether the disk that ``file`` is on is not known, and can be measured with it."""
    if file is None or (known is not None and known.disk is not None):
        return False
    return file.stat().st_size >= SMALLEST_FILE and _device(file)[1] not in MEMORY_FILESYSTEMS


def measure_for_parent(asked: dict[str, Any]) -> dict[str, Any]:
    """:func:`measured_speeds` in a process of its own."""
    file = None if asked["file"] is None else Path(asked["file"])
    numerics = Numerics.model_validate(asked["numerics"])
    measured_speeds(MachineRecord.open(), asked["threads"], numerics, file, child.report)
    return {}
