"""What was measured on this machine is remembered for this machine, and never trusted when it is not whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.budget.machines import GiB, make_machine

from tightfit.budget import machine
from tightfit.budget.machine import MachineRecord, cache_folder, machine_identity, processor, usable_cores

IDENTITY = {"processor": "one", "torch": "2.0"}

CPUINFO = """processor\t: 0
model name\t: Some Chip 9000
flags\t\t: fpu avx2 amx_int8 avx512f

processor\t: 1
model name\t: Some Chip 9000
flags\t\t: fpu avx2 amx_int8 avx512f
"""


def test_the_cache_folder_follows_the_environment() -> None:
    assert cache_folder({"TIGHTFIT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_folder({"TIGHTFIT_CACHE": "", "XDG_CACHE_HOME": "/b"}) == Path("/b/tightfit")
    assert cache_folder({"XDG_CACHE_HOME": ""}) == Path.home() / ".cache/tightfit"


def test_what_is_put_is_there_for_the_next_process(tmp_path: Path) -> None:
    record = MachineRecord.open(tmp_path / "new" / "folder", IDENTITY)
    assert record.get("engine") is None
    record.put("engine", 240_000_000)
    record.memory_bandwidth[2] = 3e10
    record.disk_bandwidth["254:0"] = 2e9
    assert record.save()
    again = MachineRecord.open(tmp_path / "new" / "folder", IDENTITY)
    assert again.get("engine") == 240_000_000
    assert (again.memory_bandwidth, again.disk_bandwidth) == ({2: 3e10}, {"254:0": 2e9})


def test_another_machine_or_version_has_another_record(tmp_path: Path) -> None:
    MachineRecord.open(tmp_path, IDENTITY).put("engine", 1)
    assert MachineRecord.open(tmp_path, IDENTITY | {"torch": "2.1"}).get("engine") is None
    assert MachineRecord.open(tmp_path, IDENTITY).get("engine") == 1


def test_a_file_of_another_machine_under_this_name_is_not_read(tmp_path: Path) -> None:
    record = MachineRecord.open(tmp_path, IDENTITY)
    record.put("engine", 1)
    assert record.file is not None
    record.file.write_text(record.file.read_text().replace('"one"', '"two"'))
    assert MachineRecord.open(tmp_path, IDENTITY).get("engine") is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"identity": 1}', '{"runtime_bytes": {}}', "\x00\xff", '{"identity": %s}']
)
def test_a_corrupt_record_is_empty_and_is_written_anew(tmp_path: Path, text: str) -> None:
    record = MachineRecord.open(tmp_path, IDENTITY)
    record.put("engine", 1)
    assert record.file is not None
    record.file.write_bytes(text.replace("%s", json.dumps(IDENTITY)).encode("latin-1"))
    damaged = MachineRecord.open(tmp_path, IDENTITY)
    assert damaged.get("engine") is None
    damaged.put("engine", 2)
    assert MachineRecord.open(tmp_path, IDENTITY).get("engine") == 2


@pytest.mark.parametrize("value", ["null", '"many"', "[1]"])
def test_a_number_that_is_none_makes_the_record_empty(tmp_path: Path, value: str) -> None:
    record = MachineRecord.open(tmp_path, IDENTITY)
    record.put("engine", 12345)
    assert record.file is not None
    record.file.write_text(record.file.read_text().replace("12345", value))
    assert MachineRecord.open(tmp_path, IDENTITY).runtime_bytes == {}


def test_a_cache_that_cannot_be_written_is_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    record = MachineRecord.open(tmp_path / "file" / "cache", IDENTITY)  # a file is in the way, even for root
    record.put("engine", 1)
    assert record.get("engine") == 1
    assert not record.save()


def test_a_write_that_fails_leaves_the_record_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MachineRecord.open(tmp_path, IDENTITY).put("engine", 1)

    def fail(*paths: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    MachineRecord.open(tmp_path, IDENTITY).put("engine", 2)
    monkeypatch.undo()
    assert MachineRecord.open(tmp_path, IDENTITY).get("engine") == 1
    assert len(list(tmp_path.iterdir())) == 1  # nothing half-written


def test_two_processes_keep_what_the_other_measured(tmp_path: Path) -> None:
    first, second = (MachineRecord.open(tmp_path, IDENTITY) for _ in range(2))
    first.put("engine", 1)
    second.put("trainer", 2)
    assert MachineRecord.open(tmp_path, IDENTITY).runtime_bytes == {"engine": 1, "trainer": 2}


def test_the_processor_is_read(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(CPUINFO)
    assert processor(tmp_path) == ("Some Chip 9000", ("amx_int8", "avx2", "avx512f", "fpu"))
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nBogoMIPS\t: 50\nFeatures\t: fp asimd i8mm\n")
    assert processor(tmp_path)[1] == ("asimd", "fp", "i8mm")


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "250000 100000"}, 2),  # with 3 threads all would wait for the third
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({}, 8),
    ],
)
def test_a_quota_of_version_2_bounds_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str | int], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    groups = {"sys/fs/cgroup/app": files}
    assert usable_cores(make_machine(tmp_path, cgroup="0::/app\n", mounts={"v2": "/"}, groups=groups)) == cores


@pytest.mark.parametrize(("quota", "cores"), [("300000", 3), ("-1", 8)])
def test_a_quota_of_version_1_bounds_the_cores_also_from_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    top = "sys/fs/cgroup/cpu,cpuacct/pod"
    groups: dict[str, dict[str, str | int]] = {
        top: {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"},
        f"{top}/app": {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"},
    }
    root = make_machine(tmp_path, cgroup="1:cpu,cpuacct:/pod/app\n", mounts={"cpu": "/"}, groups=groups)
    assert usable_cores(root) == cores


def test_affinity_bounds_the_cores() -> None:
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("affinity is a matter of Linux")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_the_identity_changes_with_what_measurements_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_machine(tmp_path)
    (root / "proc/cpuinfo").write_text(CPUINFO)
    before = machine_identity(root)
    assert machine_identity(root) == before
    (root / "proc/cpuinfo").write_text(CPUINFO.replace("amx_int8", ""))
    assert machine_identity(root) != before
    (root / "proc/cpuinfo").write_text(CPUINFO)
    make_machine(tmp_path / "smaller", total=8 * GiB)
    (tmp_path / "smaller/proc/cpuinfo").write_text(CPUINFO)
    assert machine_identity(tmp_path / "smaller") != before
    monkeypatch.setattr(machine, "version", lambda package: "99")
    assert machine_identity(root) != before
