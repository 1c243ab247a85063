"""A budget knows every limit that is in force, and never takes page cache for memory that is used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.budget.machines import GiB, MiB, make_machine, v1_memory, v2_memory
from tests.measure import run_in_cgroup, run_measured

from tightfit.budget.meter import available_memory, machine_memory, resident_set, total_memory

UNLIMITED = 9223372036854771712  # what version 1 shows where there is no limit
KUBERNETES = "/kubepods/burstable/pod1/abc"
SOURCES = str(Path(__file__).parents[2] / "src")


def test_the_resident_set_and_its_parts_are_read(tmp_path: Path) -> None:
    resident = resident_set(make_machine(tmp_path))
    assert (resident.peak, resident.current) == (300 * MiB, 200 * MiB)
    assert (resident.anon, resident.file) == (150 * MiB, 50 * MiB)
    assert resident.source == "/proc/self/status"


def test_elsewhere_the_resident_set_comes_from_getrusage_and_says_so(tmp_path: Path) -> None:
    here, elsewhere = resident_set(), resident_set(tmp_path)
    assert elsewhere.source == "getrusage and psutil"
    assert elsewhere.anon is None
    assert elsewhere.peak >= elsewhere.current
    assert abs(elsewhere.current - here.current) < 5 * MiB  # psutil is imported in between


def test_the_peak_follows_what_this_process_holds() -> None:
    before = resident_set()
    block = bytearray(b"1") * (50 * MiB)
    during = resident_set()
    del block
    assert during.current - before.current > 49 * MiB
    assert resident_set().peak >= during.current - MiB
    assert before.peak >= before.current > 0


def test_without_limits_it_is_the_machine(tmp_path: Path) -> None:
    memory = machine_memory(make_machine(tmp_path))
    assert (memory.total, memory.available, memory.resident) == (32 * GiB, 20 * GiB, 150 * MiB)
    assert (memory.limited_by, memory.source) == ("the machine", "the machine")


def test_version_2_limits_and_its_page_cache_is_available(tmp_path: Path) -> None:
    root = make_machine(
        tmp_path,
        cgroup="0::/app\n",
        mounts={"v2": "/"},
        groups={
            "sys/fs/cgroup": {"cgroup.controllers": "cpu memory"},  # the top has no memory.max
            "sys/fs/cgroup/app": v2_memory(4 * GiB, 3 * GiB, inactive_file=GiB, active_file=GiB // 2),
        },
    )
    memory = machine_memory(root)
    assert memory.total == 4 * GiB
    assert memory.available == 2 * GiB + GiB // 2  # of the 3 GiB in use, 1.5 GiB are cache
    assert (memory.limited_by, memory.source) == ("cgroup v2", "cgroup v2")


def test_version_1_limits_and_its_page_cache_is_available(tmp_path: Path) -> None:
    root = make_machine(
        tmp_path,
        cgroup="4:memory:/app\n1:cpu:/\n",
        mounts={"memory": "/"},
        groups={
            "sys/fs/cgroup/memory": v1_memory(UNLIMITED, 9 * GiB),
            "sys/fs/cgroup/memory/app": v1_memory(4 * GiB, 3 * GiB, inactive_file=GiB, active_file=GiB // 2),
        },
    )
    memory = machine_memory(root)
    assert (memory.total, memory.available) == (4 * GiB, 2 * GiB + GiB // 2)
    assert memory.limited_by == "cgroup v1"


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_limit_of_a_group_above_counts_too(tmp_path: Path, version: str) -> None:
    make, none, top, line, mount = {
        "v1": (v1_memory, UNLIMITED, "sys/fs/cgroup/memory", "4:memory:/pod/app\n", "memory"),
        "v2": (v2_memory, "max", "sys/fs/cgroup", "0::/pod/app\n", "v2"),
    }[version]
    groups = {f"{top}/pod": make(2 * GiB, GiB), f"{top}/pod/app": make(none, GiB // 8)}
    memory = machine_memory(make_machine(tmp_path, cgroup=line, mounts={mount: "/"}, groups=groups))
    # The sister of the app in the pod uses the rest of the pod's GiB.
    assert (memory.total, memory.available) == (2 * GiB, GiB)


def test_the_limit_on_the_own_group_counts_where_that_above_is_larger(tmp_path: Path) -> None:
    groups = {
        "sys/fs/cgroup/pod": v2_memory(8 * GiB, 7 * GiB),  # less is left here, though the limit is larger
        "sys/fs/cgroup/pod/app": v2_memory(4 * GiB, 0),
    }
    root = make_machine(tmp_path, cgroup="0::/pod/app\n", mounts={"v2": "/"}, groups=groups)
    memory = machine_memory(root)
    assert (memory.total, memory.available) == (4 * GiB, GiB)


def test_max_is_no_limit(tmp_path: Path) -> None:
    groups = {"sys/fs/cgroup/app": v2_memory("max", 3 * GiB)}
    memory = machine_memory(make_machine(tmp_path, cgroup="0::/app\n", mounts={"v2": "/"}, groups=groups))
    assert (memory.total, memory.available) == (32 * GiB, 20 * GiB)


def test_the_limit_above_which_a_process_is_slowed_down_counts(tmp_path: Path) -> None:
    groups = {"sys/fs/cgroup/app": v2_memory(4 * GiB, GiB, high=3 * GiB)}
    memory = machine_memory(make_machine(tmp_path, cgroup="0::/app\n", mounts={"v2": "/"}, groups=groups))
    assert (memory.total, memory.available) == (3 * GiB, 2 * GiB)


def test_with_both_versions_mounted_memory_is_where_its_controller_is(tmp_path: Path) -> None:
    root = make_machine(
        tmp_path,
        cgroup="4:cpuset,memory:/app\n0::/app\n",
        mounts={"memory": "/", "unified": "/"},
        groups={
            "sys/fs/cgroup/memory/app": v1_memory(2 * GiB, GiB),
            "sys/fs/cgroup/unified/app": {"cgroup.procs": "1"},
        },
    )
    assert machine_memory(root).total == 2 * GiB


@pytest.mark.parametrize(
    ("line", "top"),
    [
        (f"0::{KUBERNETES}\n", KUBERNETES),  # the host's path, and its part is mounted
        ("0::/\n", "/"),  # a namespace of its own
        (f"0::{KUBERNETES}\n", "/"),  # the host's path, which is not visible
        ("0::/../../other\n", "/"),  # moved out of its namespace
        ("0::/\n", KUBERNETES),  # a namespace made after mounting
    ],
)
def test_inside_a_container_what_is_mounted_is_its_own_group(tmp_path: Path, line: str, top: str) -> None:
    groups = {"sys/fs/cgroup": v2_memory(2 * GiB, GiB), "sys/other": v2_memory(GiB // 2)}
    root = make_machine(tmp_path, cgroup=line, mounts={"v2": top}, groups=groups)
    assert (machine_memory(root).total, machine_memory(root).available) == (2 * GiB, GiB)


def test_a_group_inside_a_container_is_found_below_what_is_mounted(tmp_path: Path) -> None:
    groups = {
        "sys/fs/cgroup/memory": v1_memory(2 * GiB, GiB // 2),
        "sys/fs/cgroup/memory/inner": v1_memory(GiB, GiB // 4),
    }
    line, mounts = "4:memory:/docker/abc/inner\n", {"memory": "/docker/abc"}
    root = make_machine(tmp_path, cgroup=line, mounts=mounts, groups=groups)
    assert (machine_memory(root).total, machine_memory(root).available) == (GiB, GiB * 3 // 4)


def test_a_mount_point_with_a_space_is_found(tmp_path: Path) -> None:
    root = make_machine(tmp_path, cgroup="0::/\n", groups={"my groups": v2_memory(GiB)})
    (root / "proc/self/mountinfo").write_text("30 23 0:26 / /my\\040groups rw - cgroup2 cgroup2 rw\n")
    assert machine_memory(root).total == GiB


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    groups = {"sys/fs/cgroup/app": v2_memory(GiB, 2 * GiB)}
    memory = machine_memory(make_machine(tmp_path, cgroup="0::/app\n", mounts={"v2": "/"}, groups=groups))
    assert memory.available == 0


def test_limits_of_address_space_and_data_count(tmp_path: Path) -> None:
    limits = (
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        f"Max data size             {2 * GiB}           unlimited            bytes     \n"
        f"Max address space         {3 * GiB}           unlimited            bytes     \n"
    )
    memory = machine_memory(make_machine(tmp_path, limits=limits))
    assert (memory.total, memory.limited_by) == (2 * GiB, "RLIMIT_DATA")
    assert memory.available == 2 * GiB - 400 * MiB  # VmData
    space = limits.replace(f"{2 * GiB}", "unlimited ")
    (tmp_path / "proc/self/limits").write_text(space)
    memory = machine_memory(tmp_path)
    assert (memory.total, memory.limited_by) == (3 * GiB, "RLIMIT_AS")
    assert memory.available == 3 * GiB - 800 * MiB  # VmSize


def test_elsewhere_it_comes_from_psutil_and_says_so(tmp_path: Path) -> None:
    memory = machine_memory(tmp_path)
    assert memory.source == "psutil"
    assert 0 < memory.available <= memory.total


def test_this_machine_has_what_it_says() -> None:
    assert 0 < available_memory() <= total_memory()


ASK = "from tightfit.budget.meter import *; print(total_memory(), available_memory())"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ulimit -v")
def test_a_real_limit_of_address_space_is_seen() -> None:
    # ulimit counts in KiB.
    command = ["/bin/sh", "-c", f"ulimit -v {500 * 1024}; PYTHONPATH={SOURCES} exec {sys.executable} -c '{ASK}'"]
    total, available = map(int, run_measured(command).stdout.split())
    assert total == 500 * MiB
    assert 400 * MiB < available < 500 * MiB  # an empty Python process takes 15 MiB of address space and more


def test_page_cache_in_a_real_control_group_is_available(tmp_path: Path) -> None:
    file = tmp_path / "file"
    code = f"open({str(file)!r}, 'wb').write(bytes({200 * MiB})); open({str(file)!r}, 'rb').read(); {ASK}"
    command = ["/usr/bin/env", f"PYTHONPATH={SOURCES}", sys.executable, "-c", code]
    measured = run_in_cgroup(500 * MiB, command)
    if isinstance(measured, str):
        pytest.skip(measured)
    total, available = map(int, measured.stdout.split())
    assert total == 500 * MiB
    # Python itself takes 10 MiB, and the kernel some for the process and the file. The file's 200 MiB are cache.
    assert available > 450 * MiB
