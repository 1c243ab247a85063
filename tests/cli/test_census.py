"""`tightfit census`, and what it says of models and texts that it cannot count."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import random_model
from tests.cli.command import CHECKPOINT, USAGE, check, tightfit


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model.write(tmp_path_factory.mktemp("models") / "mixture", "tiny-moe")


def test_it_counts_and_static_uses_it(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    run = ("run", mixture, "-p", "a", "-n", 2, "--ignore-eos", "--experts", "static")
    check(tightfit(*run), CHECKPOINT, "never counted", "tightfit census MODEL --file TEXT")
    done = tightfit("census", mixture, "-p", "def f(x):\n    return x\n" * 20)
    assert (done.status, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert "tokens counted: half of all choices fall on" in first
    assert f"kept in {tmp_path}" in second
    assert f"tightfit run {mixture} --experts static" in second
    assert tightfit(*run).status == 0


def test_keys(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    answer = tightfit("census", mixture, "-p", "import os", "--json").json
    assert set(answer) == {"tokens", "file", "most_used_half", "receipt"}
    assert len(answer["most_used_half"]) == 3
    assert Path(answer["file"]).is_file()


def test_what_cannot_be_counted_is_refused(mixture: Path) -> None:
    check(tightfit("census", "nano", "-p", "text"), USAGE, "nano has no experts")
    check(tightfit("run", "nano", "-p", "text", "--experts", "lru"), USAGE, "nano has no experts")
    check(tightfit("run", mixture, "-p", "text", "--experts", "gate"), USAGE, "one policy")
    check(tightfit("census", mixture, "-p", ""), USAGE, "empty")
