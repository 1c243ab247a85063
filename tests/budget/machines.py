"""Folders that look like /proc and /sys of other machines."""

from __future__ import annotations

from pathlib import Path

MiB = 1 << 20
GiB = 1 << 30

MOUNTS = {
    "v2": "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate",
    "memory": "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory",
    "cpu": "36 31 0:33 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct",
    "unified": "41 31 0:38 {top} /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
}


def make_machine(
    root: Path,
    total: int = 32 * GiB,
    available: int = 20 * GiB,
    cgroup: str = "",
    mounts: dict[str, str] | None = None,
    groups: dict[str, dict[str, str | int]] | None = None,
    limits: str = "",
) -> Path:
    """Writes /proc and the control groups of a machine into ``root``.

    ``mounts`` maps names of MOUNTS to the group that is mounted there; ``groups`` maps folders to their files.
    """
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal:       {total // 1024} kB\nMemFree:         1024 kB\nMemAvailable:   {available // 1024} kB\n"
        "HugePages_Total:       0\n"
    )
    (proc / "status").write_text(
        "Name:\tpython\nUmask:\t0022\nVmSize:\t  819200 kB\nVmHWM:\t  307200 kB\nVmRSS:\t  204800 kB\n"
        "RssAnon:\t  153600 kB\nRssFile:\t   51200 kB\nVmData:\t  409600 kB\nThreads:\t2\n"
    )
    (proc / "cgroup").write_text(cgroup)
    lines = ["22 27 0:21 / /proc rw,relatime - proc proc rw"]
    lines += [MOUNTS[name].format(top=top) for name, top in (mounts or {}).items()]
    (proc / "mountinfo").write_text("\n".join(lines) + "\n")
    if limits:
        (proc / "limits").write_text(limits)
    for folder, files in (groups or {}).items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (root / folder / name).write_text(f"{value}\n")
    return root


def v1_memory(limit: int, usage: int = 0, inactive_file: int = 0, active_file: int = 0) -> dict[str, str | int]:
    """The files of a memory group of version 1."""
    # The lines without total_ leave out the groups below, and are different.
    stat = (
        f"cache 0\ninactive_file 1\nactive_file 1\ntotal_inactive_file {inactive_file}\ntotal_active_file {active_file}"
    )
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage, "memory.stat": stat}


def v2_memory(
    limit: int | str, usage: int = 0, inactive_file: int = 0, active_file: int = 0, high: int | str = "max"
) -> dict[str, str | int]:
    """The files of a memory group of version 2."""
    stat = f"anon 0\nfile 0\ninactive_file {inactive_file}\nactive_file {active_file}\nslab_reclaimable 0"
    return {"memory.max": limit, "memory.high": high, "memory.current": usage, "memory.stat": stat}
