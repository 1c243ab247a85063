"""A folder of results: every whole line counts, a half-written last one does not, and nothing else is mixed in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.lab.test_experiment import EXPERIMENT

from tightfit.errors import UsageError
from tightfit.lab.results import EXPERIMENT as FILE
from tightfit.lab.results import RESULTS, End, Record, Refused, Results, SampleResult, begin, to_line

SAMPLE = SampleResult("kv=int4", "lookup", "a/1", {"form": "a", "tokens": 1}, {"right": 1, "answer": None}, 0.25)
OTHER = replace(SAMPLE, sample="a/2")
END = End("kv=int4", 10, 20, {"chunk": 64}, {"peak_rss_bytes": 10}, {"parameters": 3}, 1.5)
REFUSED = Refused("kv=int4", "too small", "Give more.", 30)


def write(folder: Path, *records: Record) -> None:
    with begin(folder, EXPERIMENT).adding() as adding:
        for record in records:
            adding.add(record)


def test_what_was_added_is_read_again(tmp_path: Path) -> None:
    write(tmp_path / "new", SAMPLE, END, replace(REFUSED, configuration="other"))
    results = Results.open(tmp_path / "new")
    assert results.experiment == EXPERIMENT
    assert results.samples == {("kv=int4", "lookup", "a/1"): SAMPLE}
    assert results.ends == {"kv=int4": END}
    assert results.refused == {"other": replace(REFUSED, configuration="other")}


def test_what_ended_was_refused_only_before(tmp_path: Path) -> None:
    write(tmp_path, REFUSED, END)
    assert Results.open(tmp_path).refused == {}


def test_every_whole_line_counts_wherever_a_kill_cut_the_last_one(tmp_path: Path) -> None:
    write(tmp_path, SAMPLE, OTHER)
    whole = (tmp_path / RESULTS).read_bytes()
    first = len(to_line(SAMPLE))
    for cut in range(len(whole)):
        (tmp_path / RESULTS).write_bytes(whole[:cut])
        assert len(Results.open(tmp_path).samples) == (cut >= first)
        write(tmp_path, OTHER)  # goes on behind the last whole line
        assert (tmp_path / RESULTS).read_bytes() == (whole if cut >= first else whole[first:])


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "sample"}', '{"kind": "other"}', "", "\xff"])
def test_any_other_damage_is_an_error_that_names_the_line(tmp_path: Path, line: str) -> None:
    write(tmp_path, SAMPLE)
    (tmp_path / RESULTS).write_bytes(to_line(SAMPLE).encode() + line.encode("latin-1") + b"\n")
    with pytest.raises(UsageError, match=r"line 2 of .* is damaged"):
        Results.open(tmp_path)


def test_another_experiment_is_refused_with_what_differs(tmp_path: Path) -> None:
    write(tmp_path, SAMPLE)
    with pytest.raises(UsageError, match="another experiment; seed: 0 there, 7 here"):
        begin(tmp_path, replace(EXPERIMENT, seed=7))
    assert Results.open(tmp_path).experiment == EXPERIMENT


def test_a_folder_without_results_is_begun_anew(tmp_path: Path) -> None:
    begin(tmp_path, EXPERIMENT)
    begin(tmp_path, replace(EXPERIMENT, seed=7))
    assert Results.open(tmp_path).experiment.seed == 7


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(UsageError, match="holds other files"):
        begin(tmp_path, EXPERIMENT)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', '{"version": 1}'])
def test_something_else_is_no_experiment(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UsageError, match="is not an experiment"):
        Results.open(tmp_path)


def test_a_folder_that_is_not_there_holds_no_results(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no results"):
        Results.open(tmp_path / "nowhere")


def test_one_run_writes_at_a_time(tmp_path: Path) -> None:
    results = begin(tmp_path, EXPERIMENT)
    with results.adding(), pytest.raises(UsageError, match="another run"), results.adding():
        pass
