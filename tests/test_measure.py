"""The tests' own measure of memory is right: it sees the command, all of it, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from tests.measure import run_in_cgroup, run_measured

MiB = 1 << 20
TOLERANCE = 3 * MiB  # what the peak of equal Python processes differs by, and pages that the allocator adds


def holding(nbytes: int) -> list[str]:
    """A command that holds ``nbytes`` for a moment, not at its end."""
    return [sys.executable, "-S", "-c", f"block = bytearray(b'1') * {nbytes}; del block; print('done')"]


def test_a_peak_of_known_size_is_measured() -> None:
    empty = run_measured(holding(0)).peak_bytes
    for size in (40 * MiB, 200 * MiB):
        measured = run_measured(holding(size))
        assert measured.stdout == "done\n"
        assert abs(measured.peak_bytes - empty - size) < TOLERANCE


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_the_peak_is_the_one_that_the_process_sees_itself() -> None:
    code = "block = bytearray(b'1') * (90 << 20); print(open('/proc/self/status').read())"
    measured = run_measured([sys.executable, "-S", "-c", code])
    own = next(int(line.split()[1]) * 1024 for line in measured.stdout.splitlines() if line.startswith("VmHWM"))
    assert abs(measured.peak_bytes - own) < TOLERANCE


def test_a_large_parent_does_not_show_in_the_peak_of_a_small_child() -> None:
    block = bytearray(b"1") * (600 * MiB)
    peak = run_measured(holding(0)).peak_bytes
    assert len(block) == 600 * MiB
    assert peak < 30 * MiB  # an empty Python process has about 10


def test_exit_status_output_and_input_come_through() -> None:
    code = "import sys; print(sys.stdin.read().upper()); print('trouble', file=sys.stderr); sys.exit(7)"
    measured = run_measured([sys.executable, "-c", code], input="text")
    assert (measured.exit_code, measured.stdout, measured.stderr) == (7, "TEXT\n", "trouble\n")


def test_a_signal_is_a_negative_exit_code() -> None:
    assert run_measured(["/bin/sh", "-c", "kill -TERM $$"]).exit_code == -15


def test_a_command_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(OSError, match="no-such-command"):
        run_measured(["no-such-command"])


def test_a_command_that_takes_too_long_is_killed() -> None:
    started = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        run_measured(["sleep", "60"], timeout=0.5)
    assert time.monotonic() - started < 10


def test_a_control_group_stops_what_is_larger_and_lets_pass_what_fits() -> None:
    within = run_in_cgroup(150 * MiB, holding(100 * MiB))
    if isinstance(within, str):
        pytest.skip(within)
    beyond = run_in_cgroup(150 * MiB, holding(200 * MiB))
    assert isinstance(beyond, type(within))
    assert within.exit_code == 0
    assert beyond.exit_code == -9  # killed by the kernel
