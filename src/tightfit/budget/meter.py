"""What this process holds, as the operating system counts it, and how much it could hold.

On Linux both are read from ``/proc`` and from the control groups; elsewhere from ``getrusage`` and psutil. Every result
names its ``source``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tightfit.budget.cgroup import Group, groups
from tightfit.budget.units import KiB


@dataclass(frozen=True)
class ResidentSet:
    """Bytes of this process in memory. ``anon`` and ``file`` are parts of ``current``; None where they are not told."""

    peak: int
    current: int
    anon: int | None
    file: int | None
    source: str


@dataclass(frozen=True)
class Memory:
    """Bytes that the machine has for this process.

    ``total`` is the smallest limit in force, ``available`` what could be taken in addition now without swapping (page
    cache that can be dropped is available), ``resident`` what this process holds already and could use otherwise.
    ``limited_by`` names the limit behind ``total``, ``source`` where ``available`` comes from.
    """

    total: int
    available: int
    resident: int
    limited_by: str
    source: str


def resident_set(root: Path = Path("/")) -> ResidentSet:
    """The peak and the current resident set of this process. ``root`` holds ``proc``."""
    status = _kibibytes(root / "proc/self/status")
    if "VmRSS" in status:
        return ResidentSet(
            peak=status.get("VmHWM", status["VmRSS"]),
            current=status["VmRSS"],
            anon=status.get("RssAnon"),
            file=status.get("RssFile"),
            source="/proc/self/status",
        )
    import resource

    import psutil

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else KiB)
    current = psutil.Process().memory_info().rss
    return ResidentSet(max(peak, current), current, None, None, "getrusage and psutil")


def machine_memory(root: Path = Path("/")) -> Memory:
    """What this process may use: the machine's memory, cut by control groups and by resource limits.

    ``root`` holds ``proc`` and ``sys``.
    """
    machine = _kibibytes(root / "proc/meminfo")
    status = _kibibytes(root / "proc/self/status")
    if "MemAvailable" not in machine or "VmRSS" not in status:
        import psutil

        memory, process = psutil.virtual_memory(), psutil.Process().memory_info()
        return Memory(memory.total, memory.available, process.rss, "the machine", "psutil")
    bounds = [("the machine", machine["MemTotal"], machine["MemAvailable"])]
    bounds += _group_bounds(groups("memory", root))
    bounds += _resource_bounds(root, status)
    limited_by, total, _ = min(bounds, key=lambda bound: bound[1])
    source, _, available = min(bounds, key=lambda bound: bound[2])
    # Pages of files are counted among the page cache that is available.
    own = status.get("RssAnon", status["VmRSS"])
    return Memory(total, max(available, 0), own, limited_by, source)


def total_memory() -> int:
    """Bytes that this process may hold at most: the smallest of the machine's memory and the limits on it."""
    return machine_memory().total


def available_memory() -> int:
    """Bytes that this process could take in addition now. Page cache that can be dropped counts as available."""
    return machine_memory().available


def _group_bounds(of_process: list[Group]) -> Iterator[tuple[str, int, int]]:
    """(name, limit, what is left of it) for each group that has a limit."""
    for group in of_process:
        stat = group.table("memory.stat")
        if group.version == 2:
            # Above memory.high nothing is killed, but the process is slowed down until it gives memory back.
            limits = [group.number("memory.max"), group.number("memory.high")]
            usage = group.number("memory.current")
            cache = stat.get("inactive_file", 0) + stat.get("active_file", 0)
        else:
            limits = [group.number("memory.limit_in_bytes")]
            usage = group.number("memory.usage_in_bytes")
            cache = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
        limit = min((limit for limit in limits if limit is not None), default=None)
        if limit is not None:
            yield f"cgroup v{group.version}", limit, limit - max((usage or 0) - cache, 0)


def _resource_bounds(root: Path, status: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    """The same for ``ulimit -v`` and ``ulimit -d``, which bound address space and private writable memory."""
    try:
        lines = (root / "proc/self/limits").read_text().splitlines()
    except OSError:
        return
    for title, name, used in (
        ("Max address space", "RLIMIT_AS", "VmSize"),
        ("Max data size", "RLIMIT_DATA", "VmData"),
    ):
        for line in lines:
            soft = line.removeprefix(title).split()[:1]
            if line.startswith(title) and soft and soft[0].isdigit():
                limit = int(soft[0])
                yield name, limit, limit - status.get(used, 0)


def _kibibytes(file: Path) -> dict[str, int]:
    """The ``Name:  123 kB`` lines of a file in /proc, in bytes."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    fields = (line.replace(":", " ", 1).split() for line in lines)
    return {field[0]: int(field[1]) * KiB for field in fields if len(field) == 3 and field[2] == "kB"}
