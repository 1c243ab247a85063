"""Measurements of this machine are plausible, bounded in time and memory, and say what they measured."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from tightfit.budget.units import MiB
from tightfit.errors import TightfitError, UsageError
from tightfit.plan import profile
from tightfit.plan.profile import last_level_cache, measure_bandwidth, measure_disk, measure_runtime

# Slower than the slowest memory in use (one channel of DDR3: 6 GB/s, shared by others) and faster than any.
SLOWEST_MEMORY, FASTEST_MEMORY = 5e8, 5e12


def cache_tree(root: Path, caches: list[tuple[int, int, str, str]]) -> Path:
    """Writes (processor, level, size, shared with) to the folder where the kernel lists caches."""
    for number, (cpu, level, size, shared) in enumerate(caches):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/cache/index{number}"
        folder.mkdir(parents=True)
        for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
            (folder / name).write_text(f"{text}\n")
    return root


def test_the_last_level_caches_of_all_sockets_are_added(tmp_path: Path) -> None:
    caches = [
        (0, 1, "48K", "0"),
        (0, 2, "2048K", "0"),
        (0, 3, "32768K", "0-1"),
        (1, 3, "32768K", "0-1"),  # the same one
        (2, 3, "32768K", "2-3"),
    ]
    assert last_level_cache(cache_tree(tmp_path, caches)) == 64 * MiB


def test_an_unknown_cache_is_not_guessed(tmp_path: Path) -> None:
    assert last_level_cache(tmp_path) is None


@pytest.mark.parametrize("threads", [1, 2])
def test_the_bandwidth_of_memory_is_plausible_and_the_buffer_is_stated(threads: int) -> None:
    started = time.perf_counter()
    measured = measure_bandwidth(threads, buffer_bytes=128 * MiB, seconds=0.4)
    assert SLOWEST_MEMORY < measured.bytes_per_s < FASTEST_MEMORY
    assert measured.threads == threads
    assert 0 < measured.buffer_bytes <= 128 * MiB
    assert measured.passes >= 1
    assert time.perf_counter() - started < 5  # 0.4 s, and importing numpy on a busy machine


def test_the_buffer_is_several_caches_and_leaves_memory_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "last_level_cache", lambda: 8 * MiB)
    assert measure_bandwidth(1, seconds=0.5).buffer_bytes == 32 * MiB
    monkeypatch.setattr(profile, "available_memory", lambda: 64 * MiB)
    assert measure_bandwidth(1, seconds=0.5).buffer_bytes == 16 * MiB


def test_a_buffer_that_takes_too_long_to_fill_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measure_bandwidth(1, buffer_bytes=8 << 30, seconds=0.02)  # 8 GiB in 10 ms is 800 GB/s for one thread
    assert measured.buffer_bytes < 4 << 30


def test_a_file_is_read_from_the_disk(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(20 * MiB + 5))
    measured = measure_disk(file)
    assert measured.read_bytes == 20 * MiB  # whole blocks of 4 MiB
    assert measured.bytes_per_s > 1e6
    assert measured.method in ("direct", "fadvise")
    assert measured.filesystem not in ("", "unknown")


def test_a_folder_is_measured_with_a_file_that_is_gone_afterwards(tmp_path: Path) -> None:
    measured = measure_disk(tmp_path, file_bytes=16 * MiB)
    assert measured.read_bytes == 16 * MiB
    assert list(tmp_path.iterdir()) == []


def test_reading_a_disk_ends_in_time(tmp_path: Path) -> None:
    measured = measure_disk(tmp_path, seconds=1e-9, file_bytes=64 * MiB)
    assert measured.read_bytes <= 4 * MiB


def test_without_direct_reads_the_result_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("this system has no direct reads")
    really_open = os.open

    def refuse_direct(path: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_open(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse_direct)
    assert measure_disk(tmp_path, file_bytes=16 * MiB).method == "fadvise"


def test_memory_is_not_taken_for_a_disk() -> None:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        pytest.skip("no file system in memory")
    with pytest.raises(UsageError, match="memory and not a disk"):
        measure_disk(folder)


@pytest.mark.parametrize("kind", ["missing", "small"])
def test_what_cannot_be_measured_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "small").write_bytes(b"1" * 1000)
    with pytest.raises(UsageError) as refused:
        measure_disk(tmp_path / kind)
    assert str(tmp_path / kind) in refused.value.message
    assert "4 MiB" in refused.value.hint


def test_a_runtime_is_measured_apart_from_this_process() -> None:
    block = bytearray(b"1") * (200 * MiB)
    empty = measure_runtime([])
    larger = measure_runtime(["numpy"])
    assert len(block) == 200 * MiB
    assert empty.current < 60 * MiB  # Python, the allocator's settings and the meter: about 20 MiB
    assert larger.current > empty.current + 5 * MiB  # numpy takes about 20 MiB


def test_an_import_that_fails_is_an_error_that_says_which() -> None:
    with pytest.raises(TightfitError) as failed:
        measure_runtime(["no_such_package"])
    assert "no_such_package" in failed.value.hint
