"""`tightfit plan` says what fits from headers alone, and a plan is a file that a run follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.cli.command import BUDGET, USAGE, check, tightfit

from tightfit.budget.units import format_bytes
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.engine import opening

PROMPT = ("-p", "def f(x):", "-n", 4)
ACCOUNTS = {"runtime", "weights", "kv", "workspace"}


@pytest.fixture
def headers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No byte of a tensor may be read."""

    def read_into(*arguments: object) -> None:
        pytest.fail("a tensor was read")

    monkeypatch.setattr(Checkpoint, "read_into", read_into)


@pytest.mark.usefixtures("headers_only")
def test_json_has_stable_keys_and_bytes_that_add_up(tiny: Path) -> None:
    done = tightfit("plan", tiny, "-m", "2GiB", "-c", 128, "-b", 3, "--json")
    assert (done.status, done.stderr) == (0, "")
    answer = done.json
    assert set(answer) == {"model", "budget_bytes", "plan", "predicted", "divergence", "neighbours", "precisions"}
    assert set(answer["model"]) == {"name", "family", "parameters", "context"}
    plan = answer["plan"]
    assert (plan["context"], plan["sequences"], plan["budget"]) == (128, 3, 2 << 30)
    assert set(plan["accounts"]) == ACCOUNTS
    assert sum(plan["accounts"].values()) <= answer["budget_bytes"]
    sizes = [level["smallest_bytes"] for level in answer["precisions"]]
    assert sizes == sorted(sizes, reverse=True)  # from the most precise to the smallest
    for level in answer["precisions"]:
        assert set(level) == {"format", "streamed", "smallest_bytes", "accounts"}
        assert sum(level["accounts"].values()) == level["smallest_bytes"]
    assert [level["format"] for level in answer["precisions"]][:3] == ["own", "int8", "int6"]


@pytest.mark.usefixtures("headers_only")
def test_what_does_not_fit_is_an_answer_with_the_smallest_budget_and_status_4(tiny: Path, tmp_path: Path) -> None:
    done = tightfit("plan", tiny, "-m", "5MiB", "--json", "--out", tmp_path / "plan.json")
    assert (done.status, done.stderr) == (BUDGET, "")
    assert done.json["plan"] is None
    assert done.json["smallest_bytes"] == min(level["smallest_bytes"] for level in done.json["precisions"])
    assert "The smallest budget that works is" in done.json["hint"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("headers_only")
def test_the_table_says_what_json_says(tiny: Path) -> None:
    text = tightfit("plan", tiny, "-m", "2GiB").stdout
    for part in (
        "tiny: llama, 0.4 million parameters, context 256",
        "fits into 2 GiB",
        "own precision",
        "int4",
    ):
        assert part in text
    plan = tightfit("plan", tiny, "-m", "2GiB", "--json").json["plan"]
    assert format_bytes(plan["accounts"]["weights"]) in text
    assert "does not fit into 5 MiB" in tightfit("plan", tiny, "-m", "5MiB").stdout


def test_a_plan_is_written_as_it_is_told(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text("an older one")
    answer = tightfit("plan", tiny, "-m", "2GiB", "--json", "--out", file).json
    assert json.loads(file.read_text()) == answer["plan"]
    assert list(tmp_path.iterdir()) == [file]


def test_an_interrupted_write_leaves_the_older_plan(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plan.json"
    file.write_text("an older one")

    def write_text(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text.encode()[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", write_text)
    assert tightfit("plan", tiny, "-m", "2GiB", "--out", file).status == 130
    assert file.read_text() == "an older one"
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture(scope="module")
def plan(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    assert tightfit("plan", tiny, "--memory", "2GiB", "--out", file).status == 0
    content: dict[str, Any] = json.loads(file.read_text())
    return content


PLANS: dict[str, tuple[int, dict[str, Any], str]] = {
    "another version": (USAGE, {"version": 2}, "version: Input should be 1"),
    "a layer too few": (USAGE, {"layers": "first"}, "the plan has 1 layers, and tiny has 2"),
    "an unknown format": (USAGE, {"outer": {"format": "int1", "nbytes": 1}}, "unknown technique 'int1'"),
    "an unknown placement": (USAGE, {"outer": {"format": "own", "placement": "moon", "nbytes": 1}}, "placement"),
    "an unknown type": (USAGE, {"numerics": {"gemm": "int1", "kv": "float32"}}, "numerics.gemm"),
    "an unknown key": (USAGE, {"speed": "fast"}, "speed: Extra inputs are not permitted"),
    "no chunk": (USAGE, {"chunk": 0}, "chunk: Input should be greater"),
    "no sequences": (USAGE, {"sequences": 0}, "sequences: Input should be greater"),
    "negative bytes": (USAGE, {"accounts": {"kv": -1}}, "accounts.kv: Input should be greater"),
    "a context beyond the model's": (USAGE, {"context": 257}, "trained for 256 tokens"),
    "threads of another machine": (USAGE, {"threads": 100000}, "100000 threads"),
    "a budget beyond the machine": (USAGE, {"budget": 1 << 60}, "more than the"),
    "a budget too small": (BUDGET, {"budget": 100 << 20}, "names a budget of 100 MiB"),
}


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_that_cannot_be_followed_is_refused(name: str, plan: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    status, changes, part = PLANS[name]
    if changes.get("layers") == "first":
        changes = {"layers": plan["layers"][:1]}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan | changes))
    check(tightfit("run", tiny, *PROMPT, "--plan", file), status, part)


@pytest.mark.usefixtures("unloaded")
def test_a_plan_for_another_model_is_refused(plan: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    check(tightfit("run", "nano", *PROMPT, "--plan", file), USAGE, "the plan is for tiny", "tightfit plan MODEL --out")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"x" * 1000])
def test_a_file_that_is_no_plan_is_refused(content: bytes, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    check(tightfit("run", tiny, *PROMPT, "--plan", file), USAGE, "plan.json is not a plan", "tightfit plan MODEL --out")


@pytest.mark.parametrize(
    "option", [["-m", "2GiB"], ["-c", "64"], ["-b", "2"], ["--weights", "int4"], ["--chunk", "16"]]
)
def test_a_plan_and_what_it_fixes_are_not_given_both(option: list[str], plan: Any, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    check(tightfit("run", tiny, *PROMPT, "--plan", file, *option), USAGE, "the plan fixes that", "Leave one out")


@pytest.mark.parametrize("where", [".", "nowhere/plan.json", "/proc/plan.json"])
def test_a_plan_that_cannot_be_written_is_told_and_nothing_is_left(where: str, tiny: Path, tmp_path: Path) -> None:
    check(tightfit("plan", tiny, "--out", tmp_path / where), USAGE, "cannot be written", "a folder of yours")
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_is_not_known_is_measured_and_one_that_is_is_not(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(opening, "measure_machine", lambda *arguments: asked.append(arguments))
    assert tightfit("plan", tiny, "-m", "2GiB").stderr == ""
    assert tightfit("run", tiny, "-p", "x", "-n", 1, "-m", "2GiB", "--prefer", "speed").status == 0
    assert not asked
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    assert tightfit("run", tiny, "-p", "x", "-n", 1, "-m", "2GiB").status == 0  # nothing depends on it
    assert not asked
    assert tightfit("plan", tiny, "-m", "2GiB").stderr.startswith("This machine is measured first")
    assert tightfit("run", tiny, "-p", "x", "-n", 1, "-m", "2GiB", "--prefer", "speed").status == 0
    assert len(asked) == 2
