"""The lab's runner: every configuration in a process of its own that stays inside its budget, and a run that is killed
anywhere goes on to the results that it would have had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.lab.subjects import subject

from tightfit.errors import BudgetError, FileError, TightfitError, UsageError
from tightfit.lab import runner
from tightfit.lab.reference import Stored
from tightfit.lab.results import RESULTS, End, Refused, Results, begin
from tightfit.lab.runner import Pace, Samples, State, prepare, run

TEXT = Path(runner.__file__)
TASKS = "divergence(texts=2,follow=4,tokens=60), lookup(questions=2,tokens=150)"
COMMON = {"context": 256, "memory": "1GiB"}
PATIENCE = 240  # seconds, where many others use the machine
# The last one is refused: an interpreter with torch takes more.
VARIED = "kv=window(keep=32); weights=int4; memory=150MiB"


class Recorder:
    def __init__(self) -> None:
        self.states: list[State] = []
        self.outcomes: dict[str, End | Refused] = {}

    def at(self, state: State) -> None:
        self.states.append(state)

    def ended(self, configuration: str, outcome: End | Refused) -> None:
        self.outcomes[configuration] = outcome


def prepared(folder: Path, varied: str = VARIED, **options: Any) -> tuple[Results, Samples]:
    experiment, samples = prepare("nano", [varied], TASKS, COMMON, texts=[TEXT], **options)
    return begin(folder, experiment), samples


def values(results: Results) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {key: found.values for key, found in results.samples.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Results:
    results, samples = prepared(tmp_path_factory.mktemp("lab") / "out")
    run(results, samples, "nano", Recorder())
    return Results.open(results.folder)


def test_every_configuration_is_measured_on_the_same_samples(undisturbed: Results) -> None:
    by_configuration: dict[str, set[tuple[str, str]]] = {}
    for configuration, task, sample in undisturbed.samples:
        by_configuration.setdefault(configuration, set()).add((task, sample))
    assert set(by_configuration) == {"exact", "kv=window(keep=32)", "weights=int4"}
    assert len({frozenset(each) for each in by_configuration.values()}) == 1
    assert len(by_configuration["exact"]) == 4


def test_the_exact_model_is_what_others_diverge_from(undisturbed: Results) -> None:
    kl = {key[0]: found["kl"] for key, found in values(undisturbed).items() if "divergence" in key[1]}
    assert kl["exact"] == 0.0
    assert kl["weights=int4"] > 1e-4
    assert kl["kv=window(keep=32)"] > 1e-4


def test_each_ends_with_what_it_took_inside_its_budget(undisturbed: Results) -> None:
    assert list(undisturbed.ends) == ["exact", "kv=window(keep=32)", "weights=int4"]
    for end in undisturbed.ends.values():
        assert 0 < end.peak_rss_bytes <= end.budget_bytes
        assert end.receipt["peak_rss_bytes"] <= end.peak_rss_bytes
        assert end.plan["context"] == 256
    exact, int4 = (undisturbed.ends[key].indicators for key in ("exact", "weights=int4"))
    assert exact["weights_bytes"] > 6 * int4["weights_bytes"]
    assert exact["operations_per_token"] == int4["operations_per_token"]


def test_what_does_not_fit_is_recorded_as_refused_with_what_would(undisturbed: Results) -> None:
    [refused] = undisturbed.refused.values()
    assert refused.configuration == "memory=150MiB"
    assert "does not fit into 150 MiB" in refused.error
    assert refused.smallest_bytes is not None
    assert not refused.crashed


def test_the_smallest_budget_works_and_the_peak_stays_inside(undisturbed: Results, tmp_path: Path) -> None:
    smallest = undisturbed.refused["memory=150MiB"].smallest_bytes
    results, samples = prepared(tmp_path / "out", f"memory={smallest}")
    run(results, samples, "nano", Recorder())
    [end] = [end for key, end in results.ends.items() if key != "exact"]
    assert end.budget_bytes == smallest
    assert end.peak_rss_bytes <= smallest


def test_measuring_takes_no_more_than_a_run_does(undisturbed: Results) -> None:
    command = [sys.executable, "-m", "tightfit", "run", "nano", "-p", "import os\n" * 60, "-n", "8", "--ignore-eos"]
    command += ["--context", "256", "--memory", "1GiB", "--weights", "int4", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = json.loads(done.stdout)["receipt"]["peak_rss_bytes"]
    assert undisturbed.ends["weights=int4"].peak_rss_bytes <= peak + (4 << 20)


def lab(folder: Path) -> subprocess.Popen[str]:
    options = [part for name, value in COMMON.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "tightfit", "lab", "run", "nano", "--vary", VARIED, "--tasks", TASKS]
    command += [*options, "--text", str(TEXT), "--out", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(folder: Path, lines: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if (folder / RESULTS).exists() and (folder / RESULTS).read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.002)
    pytest.fail(f"fewer than {lines} results came")


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_a_run_that_is_killed_goes_on_to_the_same_results(undisturbed: Results, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for lines in (1, 7):  # while the exact model is measured, and while another is
        process = lab(folder)
        wait_for(folder, lines)
        [subject] = children(process.pid)
        process.kill()
        process.communicate()
        deadline = time.monotonic() + 10
        while os.path.exists(f"/proc/{subject}") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not os.path.exists(f"/proc/{subject}")  # it went with its parent
    with open(folder / RESULTS, "a") as file:
        file.write('{"kind": "sample", "confi')
    assert lab(folder).wait(PATIENCE) == 0
    results = Results.open(folder)
    assert values(results) == values(undisturbed)
    assert results.ends.keys() == undisturbed.ends.keys()
    for key, end in results.ends.items():
        assert end.indicators == undisturbed.ends[key].indicators
    lines = [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]
    measured = Counter((line["configuration"], line["task"], line["sample"]) for line in lines if "sample" in line)
    assert set(measured.values()) == {1}  # none was measured again


def test_ctrl_c_ends_the_process_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = lab(tmp_path / "out")
    wait_for(tmp_path / "out", 1)
    [subject] = children(process.pid)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert stdout == ""
    *_, how, interrupted = stderr.splitlines()
    assert "the same command goes on" in how
    assert interrupted == "interrupted"
    assert not os.path.exists(f"/proc/{subject}")


# The rest is about answers and not about models.


def ran(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> tuple[Results, Recorder]:
    monkeypatch.setattr(runner, "SUBJECT", code)
    results, samples = prepared(folder, "kv=[none,int4,int2]")
    recorder = Recorder()
    run(results, samples, "nano", recorder)
    return results, recorder


def test_a_process_that_crashes_is_recorded_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The exact model has the same --kv as the first: it is another's turn.
    results, recorder = ran(tmp_path, monkeypatch, subject(crash=("int4",), die=("int2",)))
    assert list(results.ends) == ["exact", "kv=none"]
    crashed, died = results.refused["kv=int4"], results.refused["kv=int2"]
    assert crashed.error == "its process ended with status 1: ValueError: no such number"
    assert died.error == "its process was killed by SIGKILL"
    assert crashed.crashed
    assert died.crashed
    assert recorder.outcomes["kv=int4"] == crashed
    assert recorder.states[-1].configuration == "kv=int2"

    results, _ = ran(tmp_path, monkeypatch, subject())
    assert results.refused == {}
    assert len(results.ends) == 4


def test_what_is_refused_again_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        ran(tmp_path, monkeypatch, subject(refuse=("int4",)))
    assert (tmp_path / RESULTS).read_text().count('"refused"') == 1
    results, _ = ran(tmp_path, monkeypatch, subject())
    assert results.refused == {}


def test_an_exact_model_that_does_not_fit_is_an_error_that_says_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BudgetError, match="the exact model is refused: it does not fit") as found:
        ran(tmp_path, monkeypatch, subject(refuse=("none",)))
    assert '--exact "weights=bf16"' in found.value.hint
    assert found.value.smallest_bytes == 123
    monkeypatch.setattr(runner, "SUBJECT", subject())
    results, samples = prepared(tmp_path, exact="weights=bf16")  # the folder can be begun anew
    run(results, samples, "nano", Recorder())


def test_an_exact_model_that_crashes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TightfitError, match="was killed by SIGKILL"):
        ran(tmp_path, monkeypatch, subject(die=("none",)))


def test_progress_counts_samples_and_knows_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, recorder = ran(tmp_path, monkeypatch, subject())
    done = [state.done for state in recorder.states]
    assert done == sorted(done)
    assert (done[0], recorder.states[0].left, recorder.states[0].total) == (0, None, 16)
    first = recorder.states[1]
    assert first.left == pytest.approx(15 * 0.5)  # each sample says that it took half a second
    assert recorder.states[-1].done == 16


def test_the_time_left_is_told_from_samples_of_the_same_task() -> None:
    pace = Pace({"slow": [4.0, 6.0], "fast": [1.0]}, [2.0])
    assert pace.left(Counter(slow=3, fast=2, other=1), 4) == 4 * 2.0 + 3 * 5.0 + 2 * 1.0 + 11 / 3
    assert Pace().left(Counter(slow=3), 1) is None


def test_samples_fit_into_the_smallest_context_that_is_compared(tmp_path: Path) -> None:
    experiment, samples = prepare(
        "nano", ["context=[4096,200]"], "divergence(texts=1,follow=4,tokens=100%)", {}, texts=[TEXT]
    )
    assert experiment.context == 200
    assert experiment.configurations[0].wish["context"] == 200
    assert {len(each.prompt) + len(each.following) for [each] in samples.values()} <= {199, 200}


def test_an_unknown_task_is_an_error_before_anything_runs() -> None:
    with pytest.raises(UsageError, match="unknown technique 'juggling'"):
        prepare("nano", [], "juggling", {})


def test_rows_that_are_gone_are_an_error(undisturbed: Results, tmp_path: Path) -> None:
    _, samples = prepared(tmp_path / "out")
    task, [sample, *_] = next(iter(samples.items()))
    stored = Stored.of(undisturbed.folder / "reference", task, sample, 6144)
    assert stored.logits(3).shape == (6144,)
    with pytest.raises(FileError, match="it has no row 4"):
        stored.logits(4)
    with pytest.raises(FileError, match="cannot be read"):
        Stored.of(tmp_path, task, sample, 6144).logits(0)
