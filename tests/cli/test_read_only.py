"""A model may lie where nothing can be written: no command tries to."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests import tiny_llama

from tightfit import child

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1


def unprivileged() -> None:
    """From here on permissions count for root too, once another program is executed."""
    if os.getuid() == 0:
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=child.environment(),
        preexec_fn=unprivileged,
        capture_output=True,
        text=True,
        check=False,
    )


def tightfit(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "tightfit", *arguments, cwd=cwd)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A model whose folder and files cannot be written."""
    model = tiny_llama.write(tmp_path / "model", shards=2)
    paths = [*model.iterdir(), model]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if run("touch", model / "x", cwd=tmp_path).returncode == 0:
        pytest.skip("this user may write everywhere")
    yield model
    model.chmod(0o755)


def test_commands_run_on_a_folder_and_in_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    for arguments in (
        ("run", ".", "-p", "x", "-n", 2),
        ("plan", folder, "--out", tmp_path / "plan.json"),
        ("run", folder, "-p", "x", "-n", 2, "--plan", tmp_path / "plan.json"),
        ("compress", folder, "--weights", "int4", "--out", tmp_path / "int4"),
    ):
        done = tightfit(*arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
    assert before == {path.name: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    done = tightfit("compress", folder, "--weights", "int4", "--out", folder / "int4", cwd=tmp_path)
    assert "int4 cannot be written: Permission denied" in done.stderr
