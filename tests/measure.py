"""The peak resident set of a command as the operating system saw it, and commands in a control group of a given size.

``ru_maxrss`` of a child is not its own: a process that is forked, or spawned as vfork does, starts with the peak of its
parent. So a minimal Python process stands between: it is all that the command can inherit from.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tightfit.budget.cgroup import groups

# Prints {"exit_code", "peak"} to the file descriptor that its first argument names. It imports nothing that is not
# built in: its own size, about 9 MiB, is the smallest peak that can be measured.
LAUNCHER = """
import posix, sys
report = int(sys.argv[1])
posix.set_inheritable(report, False)
try:
    child = posix.posix_spawnp(sys.argv[2], sys.argv[2:], posix.environ)
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
_, status, usage = posix.wait4(child, 0)
code = posix.waitstatus_to_exitcode(status)
posix.write(report, b'{"exit_code": %d, "peak": %d}' % (code, usage.ru_maxrss))
"""
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes

# The shell joins the group whose file is $0, and becomes the command: only the command's memory is charged to it.
JOIN = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True)
class Measured:
    """How a command ended. ``exit_code`` is minus the signal that killed it; ``peak_bytes`` is its peak resident set.

    Of children that the command waited for, the largest counts if it is larger.
    """

    exit_code: int
    stdout: str
    stderr: str
    peak_bytes: int


def run_measured(
    command: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    input: str = "",
    timeout: float = 120,
) -> Measured:
    """Runs ``command`` to its end. Raises subprocess.TimeoutExpired, and kills it, after ``timeout`` seconds."""
    reader, writer = os.pipe()
    with os.fdopen(reader) as report:
        try:
            launcher = subprocess.Popen(
                [sys.executable, "-S", "-E", "-I", "-c", LAUNCHER, str(writer), *map(str, command)],
                env=env,
                cwd=cwd,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=[writer],
                start_new_session=True,
            )
        finally:
            os.close(writer)
        with launcher:
            try:
                stdout, stderr = launcher.communicate(input, timeout)
            except BaseException:
                os.killpg(launcher.pid, signal.SIGKILL)
                raise
        result = report.read()
    if not result:
        raise OSError(f"{command[0]} could not be started: {stderr}")
    fields = json.loads(result)
    return Measured(fields["exit_code"], stdout, stderr, fields["peak"] * MAXRSS_UNIT)


def run_in_cgroup(limit_bytes: int, command: Sequence[str | Path], timeout: float = 120) -> Measured | str:
    """Runs ``command`` in a new control group whose memory is limited, page cache included, without swap.

    Returns why not, where this machine does not let this user make one: a test then skips.
    """
    own = groups("memory")
    limited = [group for group in own if group.number("memory.limit_in_bytes") is not None]
    # In version 2 a group with processes cannot have limited children, except the top one.
    parent = limited[0] if limited else own[-1] if own else None
    if parent is None:
        return "no control groups for memory are mounted"
    folder = parent.folder / f"tightfit-test-{os.getpid()}-{time.monotonic_ns()}"
    try:
        folder.mkdir()
    except OSError as error:
        return f"no control group can be made in {parent.folder}: {error.strerror}"
    try:
        try:
            if parent.version == 1:
                (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
                (folder / "memory.swappiness").write_text("0")
            else:
                (folder / "memory.max").write_text(str(limit_bytes))
                (folder / "memory.swap.max").write_text("0")
        except OSError as error:
            return f"the memory of a control group in {parent.folder} cannot be limited: {error.strerror}"
        return run_measured(["/bin/sh", "-c", JOIN, folder / "cgroup.procs", *command], timeout=timeout)
    finally:
        _remove(folder)


def _remove(group: Path) -> None:
    """A group can be removed once its last process is gone, which may take a moment."""
    until = time.monotonic() + 5
    while True:
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
