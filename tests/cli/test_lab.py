"""`tightfit lab run`: what it prints, and how it ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.command import BUDGET, USAGE, Result, check, tightfit
from tests.lab.subjects import subject

from tightfit.lab import runner
from tightfit.lab.results import Results

OPTIONS = ["--tasks", "divergence(texts=1,follow=4,tokens=60)", "--context", 256, "--text", runner.__file__]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SUBJECT", subject(refuse=("int4",)))


def lab(out: Path, *arguments: str | Path) -> Result:
    return tightfit("lab", "run", *arguments, *OPTIONS, "--out", out)


def test_a_table_on_standard_output_and_a_line_for_each_configuration_beside_it(tiny: Path, tmp_path: Path) -> None:
    done = lab(tmp_path / "out", tiny, "--vary", "kv=[none,int4]")
    assert done.status == 0
    assert done.stderr.splitlines() == [
        *(f"{key}: peak 2 MiB of 3 MiB, {_seconds(tmp_path, key)} s" for key in ("exact", "kv=none")),
        "kv=int4: refused: it does not fit",
    ]
    table = done.stdout.split("\n ")
    assert table[1].split() == ["configuration", "samples", "peak", "weights", "kv"]
    assert [row.split()[0] for row in table[3:]] == ["exact", "kv=none", "kv=int4"]
    assert "refused: it does not fit" in table[5]


def _seconds(tmp_path: Path, key: str) -> str:
    return f"{Results.open(tmp_path / 'out').ends[key].seconds:.1f}"


def test_the_same_command_again_measures_nothing(tiny: Path, tmp_path: Path) -> None:
    first = lab(tmp_path, "--model", tiny, "--vary", "kv=none", "--json").json
    again = lab(tmp_path, tiny, "--vary", "kv=none", "--json").json
    assert (first["measured"], again["measured"]) == (2, 0)
    assert first["configurations"] == again["configurations"]


def test_another_experiment_leaves_a_folder_alone(tiny: Path, tmp_path: Path) -> None:
    lab(tmp_path, tiny, "--vary", "kv=none")
    check(lab(tmp_path, tiny, "--vary", "kv=none", "--seed", "1"), USAGE, "seed: 0 there, 1 here")


def test_a_crash_is_told_by_the_exit_status(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SUBJECT", subject(crash=("int4",)))
    done = lab(tmp_path, tiny, "--vary", "kv=[int4,int8]")
    assert done.status == 1
    assert "error: 1 of the processes crashed: kv=int4\nThe same command" in done.stderr
    assert "kv=int8" in done.stdout


def test_an_exact_model_that_does_not_fit(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SUBJECT", subject(refuse=("none",)))
    check(lab(tmp_path, tiny, "--vary", "kv=int4"), BUDGET, "the exact model is refused", "--exact")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--vary", "kv"], "cannot read 'kv'"),
        (["--vary", "kv=none", "--tasks", "juggling"], "'juggling'"),
        (["--exact", "weights=int99"], "'int99'"),
        (["--kv", "int99"], "'int99'"),
        (["--model", "other"], "two models"),
        (["--text", "nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(
    tiny: Path, tmp_path: Path, arguments: list[str], part: str
) -> None:
    out = tmp_path / "out"
    check(tightfit("lab", "run", tiny, *OPTIONS, *arguments, "--out", out), USAGE, part)
    assert not out.exists()
