"""Whatever way the bytes of a file come, past the page cache or through it, they are the file's."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tightfit.checkpoints import positioned
from tightfit.checkpoints.positioned import ALIGNMENT, REQUEST, SMALL, CachedPages, DirectFile, PositionedFile

SIZE = 5 * REQUEST + 4321
OPEN = os.open
WAYS = ("past the cache", "through the cache", "no direct I/O", "direct I/O that fails")


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "file"
    path.write_bytes(content)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    forget(path)
    return path


@pytest.fixture(params=WAYS)
def file(request: pytest.FixtureRequest, path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PositionedFile]:
    if request.param == "through the cache":
        monkeypatch.setattr(positioned, "DIRECT", 0)
    elif request.param == "no direct I/O":
        monkeypatch.setattr(positioned, "DIRECT", 1 << 30)  # no such flag
        monkeypatch.setattr(os, "open", without_direct)
    elif request.param == "direct I/O that fails":
        monkeypatch.setattr(DirectFile, "_attempt", lambda *arguments: 0)
    opened = PositionedFile(os.open(path, os.O_RDONLY))
    yield opened
    opened.close()


def forget(path: Path) -> None:
    """Lets the page cache forget a file."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(file: PositionedFile, position: int, view: memoryview, again: bool = False) -> int:
    """Fills ``view``; gives how many bytes there were."""
    done = 0
    while done < len(view) and (count := file.read_some(position + done, view[done:], again)):
        done += count
    return done


def without_direct(path: str | Path, flags: int) -> int:
    if flags & positioned.DIRECT:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return OPEN(path, flags)


def is_cached(path: Path) -> bool:
    """Whether the middle of a file is in the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    pages = CachedPages(descriptor)
    os.close(descriptor)
    found = pages.hold(SIZE // 2, 100_000)
    pages.close()
    return found


# Beginnings and lengths around what is aligned, small, one request, several, and the end of the file.
@pytest.mark.parametrize("position", [0, 1, ALIGNMENT, 3 * ALIGNMENT - 1, 2 * REQUEST - 7, SIZE - REQUEST, SIZE - 3])
@pytest.mark.parametrize("length", [1, SMALL - 1, SMALL, REQUEST, REQUEST + 1, 3 * REQUEST + 12345])
@pytest.mark.parametrize("cached", [False, True])
def test_every_range_is_read(
    position: int, length: int, cached: bool, file: PositionedFile, path: Path, content: bytes
) -> None:
    if cached:
        path.read_bytes()
    buffer = bytearray(length)
    expected = content[position : position + length]
    assert read(file, position, memoryview(buffer)) == len(expected)
    assert buffer[: len(expected)] == expected


def test_aligned_memory_is_read_without_a_detour(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DirectFile, "_memory", lambda self: pytest.fail("read into other memory"))
    file = PositionedFile(os.open(path, os.O_RDONLY))
    with mmap.mmap(-1, 2 * REQUEST) as memory, memoryview(memory) as view:
        assert read(file, REQUEST, view) == len(view)
        assert view == content[REQUEST : 3 * REQUEST]
    file.close()


def test_the_page_cache_keeps_what_will_be_read_again_and_nothing_else(path: Path) -> None:
    if is_cached(path):
        pytest.skip("this file system's files are always cached")
    file = PositionedFile(os.open(path, os.O_RDONLY))
    buffer = memoryview(bytearray(SIZE))
    read(file, 0, buffer)
    assert not is_cached(path)
    read(file, 0, buffer, again=True)
    assert is_cached(path)
    file.close()


def test_a_part_that_is_not_cached_is_told(path: Path) -> None:
    with path.open("rb") as stream:
        pages = CachedPages(stream.fileno())
        if pages.hold(0, SIZE):
            pytest.skip("this file system's files are always cached")
        os.pread(stream.fileno(), SIZE, 0)
        assert pages.hold(0, SIZE)
        os.posix_fadvise(stream.fileno(), 2 * REQUEST, REQUEST, os.POSIX_FADV_DONTNEED)
    assert pages.hold(0, 2 * REQUEST)
    assert not pages.hold(2 * REQUEST - 1, 2)
    assert pages.hold(3 * REQUEST, SIZE - 3 * REQUEST)
    pages.close()


def test_several_threads_read_at_the_same_time(file: PositionedFile, content: bytes) -> None:
    wrong: list[int] = []

    def run(start: int) -> None:
        for position in range(start, SIZE, 3 * 200_000):
            buffer = bytearray(min(200_000, SIZE - position))
            read(file, position, memoryview(buffer))
            if buffer != content[position : position + len(buffer)]:
                wrong.append(position)

    threads = [threading.Thread(target=run, args=(start,)) for start in (0, 200_000, 400_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_error_of_the_disk_is_raised(file: PositionedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output error"):
        file.read_some(0, memoryview(bytearray(SMALL)), False)


def test_closing_closes_both_descriptors(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    file = PositionedFile(os.open(path, os.O_RDONLY))
    file.read_some(0, memoryview(bytearray(SMALL)), False)
    file.close()
    assert len(os.listdir("/proc/self/fd")) == before
