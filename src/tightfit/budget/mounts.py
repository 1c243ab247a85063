"""The table of mounted file systems of a Linux process."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MEMORY_FILESYSTEMS = ("tmpfs", "ramfs", "devtmpfs")


@dataclass(frozen=True)
class Mount:
    """A file system, the folder inside it that is mounted (``top``), and where (``point``)."""

    filesystem: str
    options: tuple[str, ...]
    top: PurePosixPath
    point: Path


def mounts(root: Path = Path("/")) -> list[Mount]:
    """The lines of ``/proc/self/mountinfo`` in order; ``root`` holds ``proc``. Empty where there is no such file."""
    try:
        lines = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        before, _, after = line.partition(" - ")
        filesystem, _, options = after.split(" ", 2)
        top, point = (_unescape(field) for field in before.split(" ")[3:5])
        found.append(Mount(filesystem, tuple(options.split(",")), PurePosixPath(top), root / point.lstrip("/")))
    return found


def _unescape(field: str) -> str:
    """Spaces and the like are written as a backslash and three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def in_memory(folder: str | Path) -> bool:
    """Whether files of ``folder`` lie in memory and not on a disk."""
    path = Path(folder).resolve()
    holding = [mount for mount in mounts() if path.is_relative_to(mount.point)]
    last = max(holding, key=lambda mount: len(mount.point.parts), default=None)
    return last is not None and last.filesystem in MEMORY_FILESYSTEMS
