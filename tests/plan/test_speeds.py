"""Speeds are kept with their version, checked when they are read, and measured again where they do not pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.plan import fake_speeds as fake

from tightfit import api, child
from tightfit.budget.machine import MachineRecord
from tightfit.budget.units import MiB
from tightfit.engine.generate import Timing
from tightfit.plan.profile import measured_speeds
from tightfit.plan.speeds import Speeds, across, at, device_of, known_speeds, speeds_key

MACHINE = {"processor": "some"}
LOOSE = 3.0  # times that a prediction may be off
ATTEMPTS = 3


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is asked to be measured; answered at once."""
    questions: list[dict[str, Any]] = []

    def ask(target: str, question: dict[str, Any], progress: object = None) -> dict[str, Any]:
        questions.append(question)
        speeds = fake.speeds().model_dump(mode="json", exclude={"disk"})
        return {"speeds": speeds if question["wanted"] else None, "disk": question["file"] and fake.DISK.model_dump()}

    monkeypatch.setattr(child, "ask", ask)
    return questions


def record(folder: Path) -> MachineRecord:
    return MachineRecord.open(folder, MACHINE)


def test_curves_are_straight_between_measurements_and_go_on_behind_them() -> None:
    curve = {1: 1.0, 3: 2.0, 8: 7.0}
    assert [at(curve, place) for place in (0, 1, 2, 3, 4, 8, 10)] == [1.0, 1.0, 1.5, 2.0, 3.0, 7.0, 9.0]
    assert at({4: 2.0}, 100) == 2.0
    assert at({1: 5.0, 2: 3.0}, 100) == 3.0  # a fall does not go on: nothing would be free
    assert across({10: {1: 1.0}, 20: {1: 2.0}}, 15, 7) == 1.5


def test_speeds_are_measured_once_and_kept(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    assert known_speeds(record(tmp_path), 2, fake.NUMERICS) is None
    measured = measured_speeds(record(tmp_path), 2, fake.NUMERICS)
    assert measured == fake.speeds(disk=None)
    assert measured_speeds(record(tmp_path), 2, fake.NUMERICS) == measured
    assert known_speeds(record(tmp_path), 2, fake.NUMERICS) == measured
    assert len(asked) == 1
    measured_speeds(record(tmp_path), 1, fake.NUMERICS)  # with another number of threads
    measured_speeds(record(tmp_path), 2, fake.NUMERICS, again=True)
    assert len(asked) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry | {"version": 2},
        lambda entry: entry | {"step": -1.0},
        lambda entry: entry | {"formats": {}, "read": {}},
        lambda entry: {name: value for name, value in entry.items() if name != "layer"},
        lambda entry: "nothing",
    ],
)
def test_what_is_damaged_or_of_another_version_is_measured_again(
    tmp_path: Path, asked: list[dict[str, Any]], damage: Any
) -> None:
    measured_speeds(record(tmp_path), 2, fake.NUMERICS)
    kept = record(tmp_path)
    key = speeds_key(2, fake.NUMERICS)
    kept.speeds[key] = damage(kept.speeds[key])
    kept.save()
    assert known_speeds(record(tmp_path), 2, fake.NUMERICS) is None
    assert measured_speeds(record(tmp_path), 2, fake.NUMERICS) == fake.speeds(disk=None)
    assert len(asked) == 2


def test_a_record_of_before_there_were_speeds_is_still_read(tmp_path: Path) -> None:
    old = record(tmp_path)
    old.put("imports", 5)
    assert old.file is not None
    content = json.loads(old.file.read_text())
    del content["speeds"], content["disks"]
    old.file.write_text(json.dumps(content))
    assert (record(tmp_path).get("imports"), record(tmp_path).speeds) == (5, {})


def test_the_disk_is_measured_for_each_device_where_the_file_is_large_enough(
    tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"1")
    with large.open("wb") as file:
        file.truncate(128 * MiB)  # a hole takes no room
    assert measured_speeds(record(tmp_path), 2, fake.NUMERICS, small).disk is None
    assert measured_speeds(record(tmp_path), 2, fake.NUMERICS, large).disk == fake.DISK
    assert measured_speeds(record(tmp_path), 2, fake.NUMERICS, large).disk == fake.DISK
    assert [(each["wanted"], each["file"]) for each in asked] == [(True, None), (False, str(large))]
    assert set(record(tmp_path).disks) == {device_of(large)}


def test_speeds_survive_being_written_and_read() -> None:
    assert Speeds.model_validate_json(fake.speeds().model_dump_json()) == fake.speeds()


def test_what_was_measured_here_predicts_a_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real profile and the embedded model. Where the machine does other work both are off: the best of several
    runs counts, and what was measured at a bad moment is measured again."""
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    prompt = "#" * 900
    steps: list[tuple[int, int]] = []

    def ratios(model: api.Model) -> list[float]:
        measured_speeds(
            MachineRecord.open(),
            model.plan.threads,
            model.plan.numerics,
            progress=lambda done, total: steps.append((done, total)),
            again=True,
        )
        runs = []
        for _ in range(5):
            model._generator.timing = Timing()
            model.generate(prompt, max_new_tokens=64, ignore_eos=True)
            runs.append(model.receipt()["predicted"])
        return [
            runs[0][phase]["predicted_s"] / min(run[phase]["measured_s"] for run in runs)
            for phase in ("prefill", "decode")
        ]

    with api.load("nano", memory="4GiB", context=1024, threads=1) as model:  # other tests keep cores busy
        assert model.receipt()["predicted"] is None  # nothing was measured
        found = [ratios(model)]
        while not all(1 / LOOSE < ratio < LOOSE for ratio in found[-1]):
            assert len(found) < ATTEMPTS, found
            found.append(ratios(model))
    assert steps[0][0] == 1
    assert max(done for done, _ in steps) <= steps[0][1]
