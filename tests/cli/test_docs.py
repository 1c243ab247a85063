"""docs/commands.md lists the keys that come and the options that there are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.command import tightfit
from tests.lab import folders
from tests.lab.subjects import subject

from tightfit.lab import runner

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()


def documented(title: str) -> set[str]:
    """The keys in the table that follows on the line ``title``."""
    table = PAGE.split(f"\n{title}\n\n| key | |\n|---|---|\n")[1].split("\n\n")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE))


def paths(value: Any, known: set[str], path: str = "") -> Iterator[str]:
    """Where the values of ``value`` stand, down to those that are documented as a whole."""
    if path in known or not isinstance(value, (dict, list)):
        yield path
    elif isinstance(value, list):
        for item in value:
            yield from paths(item, known, f"{path}[]")
    else:
        for key, item in value.items():
            name = "ACCOUNT" if path.endswith("accounts") else key
            yield from paths(item, known, f"{path}.{name}" if path else name)


def test_keys_of_run(tiny: Path) -> None:
    known = documented("`tightfit run --json`:")
    assert set(paths(tightfit("run", tiny, "-p", "x", "-n", 2, "--json").json, known)) == known


def test_keys_of_plan(tiny: Path) -> None:
    known = documented("`tightfit plan --json`:")
    fits, refused = (tightfit("plan", tiny, "-m", budget, "--json").json for budget in ("2GiB", "5MiB"))
    assert set(paths(fits, known)) == known - {"hint", "smallest_bytes"}
    assert set(paths(refused, known)) == known


def test_keys_of_a_plan(tiny: Path) -> None:
    known = documented("A plan, in receipts, in `tightfit plan --json` and as a file:")
    assert set(paths(tightfit("plan", tiny, "--json").json["plan"], known)) == known


def test_keys_of_compress(tiny: Path, tmp_path: Path) -> None:
    receipt = tightfit("compress", tiny, "--weights", "int4", "--out", tmp_path / "out", "--json").json
    assert documented("`tightfit compress --json`:") == set(receipt)


def test_keys_of_sensitivity(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    answer = tightfit("sensitivity", tiny, "--formats", "int8,int4(group=64)", "--json").json
    assert documented("`tightfit sensitivity --json`:") == set(answer)
    assert set(answer["weights"]["layers.0"]) == {"int8", "int4(group=64)"}


def test_keys_of_fit(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    (tmp_path / "text.txt").write_text("import os\n" * 100)
    kv = "kvsharer(share=0.5,threshold=-1)"
    answer = tightfit("fit", tiny, "--kv", kv, "--text", tmp_path / "text.txt", "--json").json
    assert documented("`tightfit fit --json`:") == set(answer)


def test_keys_of_doctor() -> None:
    from tightfit.cli.doctor import collect

    assert documented("`tightfit doctor --json`:") == set(collect(measure=False))


def test_keys_of_techniques() -> None:
    known = documented("`tightfit techniques --json`:")
    assert set(paths(tightfit("techniques", "--json").json, known)) == known


def test_keys_of_lab_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SUBJECT", subject(refuse=("int4",)))
    options = ["--vary", "kv=[none,int4]", "--tasks", "perplexity(windows=1,tokens=8,after=8)"]
    answer = tightfit("lab", "run", tiny, *options, "--text", runner.__file__, "--out", tmp_path, "--json").json
    known = documented("`tightfit lab run --json`:")
    assert set(paths(answer, known)) == known


def test_keys_of_lab_report(tmp_path: Path) -> None:
    answer = tightfit("lab", "report", folders.write(tmp_path), "--json").json
    known = documented("`tightfit lab report --json`:")
    assert set(paths(answer, known)) == known


@pytest.mark.parametrize("arguments", ["--seam weights", "int4 --seam kv"])
def test_examples_of_techniques_are_what_is_printed(arguments: str) -> None:
    [example] = re.findall(rf"\$ tightfit techniques {arguments}\n(.*?)```", PAGE, re.DOTALL)
    printed = [line.split() for line in tightfit("techniques", *arguments.split()).stdout.splitlines()]
    assert all(line.split() in printed for line in example.splitlines() if line.strip() != "...")


@pytest.mark.parametrize("command", ["run", "plan", "compress", "doctor", "techniques", "lab run", "lab report"])
def test_every_option_in_the_examples_is_there(command: str) -> None:
    used = {
        option
        for line in re.findall(rf"tightfit {command} ([^`\n]*)", PAGE)
        for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", line)
    }
    text = tightfit(*command.split(), "--help").stdout
    assert used <= set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", text)), used
