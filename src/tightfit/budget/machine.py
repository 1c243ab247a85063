"""The record of this machine: what it is, and what was measured on it, kept as JSON in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tightfit.budget.cgroup import groups
from tightfit.budget.meter import machine_memory
from tightfit.budget.units import GiB
from tightfit.errors import FileError


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """``$TIGHTFIT_CACHE``, else ``$XDG_CACHE_HOME/tightfit``, else ``~/.cache/tightfit``. It may not exist."""
    if own := environment.get("TIGHTFIT_CACHE"):
        return Path(own)
    return Path(environment.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "tightfit"


def versions() -> dict[str, str]:
    """Versions of what decides how many bytes and seconds things take, without importing any of it."""
    found = {"python": platform.python_version()}
    for package in ("torch", "tightfit"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout that is on the path and not installed
            found[package] = "not installed"
    return found


def processor(root: Path = Path("/")) -> tuple[str, tuple[str, ...]]:
    """The model name of the processor and its features in alphabetical order, as the kernel lists them."""
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), ()
    model = re.search(r"^(?:model name|Processor|cpu model)\s*:\s*(.+)$", text, re.MULTILINE)
    features = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    names = tuple(sorted(features[1].split())) if features else ()
    return (model[1].strip() if model else platform.machine()), names


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may keep busy: its affinity, cut by the processor quota of its control groups.

    A quota of 2.5 cores gives 2: threads that wait for one another stand still when a quota runs out.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in groups("cpu", root):
        if group.version == 2:
            quota, period = [*(group.read("cpu.max") or "max 1").split(), "100000"][:2]
        else:
            quota, period = (group.read(f"cpu.cfs_{name}_us") or "-1" for name in ("quota", "period"))
        if quota.isdigit() and int(quota) > 0 and int(period) > 0:
            cores = min(cores, max(int(quota) // int(period), 1))
    return cores


MEASURED = ("runtime_bytes", "memory_bandwidth", "disk_bandwidth", "speeds", "disks")


@dataclass
class MachineRecord:
    """What was measured on this machine with these versions.

    ``runtime_bytes`` holds resident sets by what was imported and run, ``memory_bandwidth`` bytes per second by number
    of threads, ``disk_bandwidth`` bytes per second by device (``major:minor``). ``speeds`` of kernels by what was
    measured, and ``disks`` by device, are as :mod:`tightfit.plan.profile` writes and checks them. A record that is
    missing, corrupt or of another machine is empty. Without a ``file`` nothing is kept beyond this process.
    """

    identity: dict[str, str]
    file: Path | None = None
    runtime_bytes: dict[str, int] = field(default_factory=dict)
    memory_bandwidth: dict[int, float] = field(default_factory=dict)
    disk_bandwidth: dict[str, float] = field(default_factory=dict)
    speeds: dict[str, Any] = field(default_factory=dict)
    disks: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path | None = None, identity: dict[str, str] | None = None) -> MachineRecord:
        """The record of this machine from ``folder`` (the cache folder by default)."""
        identity = machine_identity() if identity is None else identity
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        record = cls(identity, (cache_folder() if folder is None else folder) / f"machine-{digest}.json")
        record._read()
        return record

    def get(self, key: str) -> int | None:
        """The resident set in bytes that was measured under ``key``, or None."""
        return self.runtime_bytes.get(key)

    def put(self, key: str, nbytes: int) -> None:
        """Keep the resident set that was measured under ``key``."""
        self.runtime_bytes[key] = nbytes
        self.save()

    def save(self, replace: Collection[str] = ()) -> bool:
        """Write the record, together with what other processes have added to it since it was read, but to what is named
        in ``replace``.

        Returns whether it could be written. If not, the next process measures again.
        """
        if self.file is None:
            return False
        own = {name: dict(getattr(self, name)) for name in MEASURED}
        self._read()
        for name, values in own.items():
            setattr(self, name, values if name in replace else getattr(self, name) | values)
        measured = {name: getattr(self, name) for name in MEASURED}
        text = json.dumps({"identity": self.identity} | measured, indent=1)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, text)
        except OSError:
            return False
        return True

    def _read(self) -> None:
        """Replace the measurements by those in the file, if it is a whole record of this machine."""
        try:
            content: Any = json.loads(self.file.read_text()) if self.file else None
            if content["identity"] != self.identity:
                return
            runtime = {str(key): int(value) for key, value in content["runtime_bytes"].items()}
            memory = {int(key): float(value) for key, value in content["memory_bandwidth"].items()}
            disk = {str(key): float(value) for key, value in content["disk_bandwidth"].items()}
            speeds, disks = dict(content.get("speeds", {})), dict(content.get("disks", {}))  # older records have none
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return
        self.runtime_bytes, self.memory_bandwidth, self.disk_bandwidth = runtime, memory, disk
        self.speeds, self.disks = speeds, disks


def machine_identity(root: Path = Path("/")) -> dict[str, str]:
    """What a measurement depends on. Two machines of one kind, on a shared home folder, share a record."""
    model, features = processor(root)
    kernel = platform.uname()
    return {
        "processor": model,
        "features": hashlib.sha256(" ".join(features).encode()).hexdigest()[:16],
        "cores": str(usable_cores(root)),
        "memory": f"{round(machine_memory(root).total / GiB)} GiB",
        "system": f"{kernel.system} {kernel.release} {kernel.machine}",
        "implementation": sys.implementation.cache_tag or sys.implementation.name,
        **versions(),
    }


def remember(file: Path, content: str | bytes) -> Path:
    """Writes a file of the cache folder, whole or not at all. Raises FileError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, content)
    except OSError as error:
        hint = "Name a folder of yours with TIGHTFIT_CACHE."
        raise FileError(f"{file} cannot be written: {error.strerror}", hint) from error
    return file


def write_atomically(file: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as temporary:
            temporary.write(content.encode() if isinstance(content, str) else content)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
