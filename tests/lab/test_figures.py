"""The catalog's figures are of the techniques that there are and of the model that ships, and are still true."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lab import folders

import tightfit
from tightfit import zoo
from tightfit.catalog import Technique, all_techniques, parse_one
from tightfit.checkpoints.checkpoint import open_checkpoint
from tightfit.errors import UsageError
from tightfit.kv.fitted import Fitted
from tightfit.lab import figures
from tightfit.lab.experiment import EXACT_WISH
from tightfit.lab.material import Material, Source
from tightfit.lab.reader import Reader
from tightfit.lab.results import Results
from tightfit.lab.tasks import Sample

MEASURED = [entry for entry in all_techniques() if entry.seam in figures.SEAMS]
# Processors multiply in other types (bfloat16 in AMX, float32 in AVX2), and sums come in another order: divergences on
# AMX, AVX2 and the portable kernels were up to 15% apart (int8), the smallest ones up to 3e-6 nats. Between neighbours
# such as int4 and int5 lies a factor of three or more.
RELATIVE, ABSOLUTE = 0.25, 1e-5
SPOT = {"task": "divergence(texts=6)", "sample": "1024/0", "prompt": [1], "following": [2]}


def agrees(found: float, stored: float) -> bool:
    return abs(found - stored) <= RELATIVE * stored + ABSOLUTE


def named(entry: Technique) -> str:
    return f"{entry.seam}={entry.name}"


class Stored:
    """The exact model's rows of logits on the spot sample."""

    def __init__(self, rows: list[torch.Tensor]) -> None:
        self._rows = rows

    def logits(self, index: int) -> torch.Tensor:
        return self._rows[index]

    @property
    def tokens(self) -> list[int]:
        return []


@pytest.fixture(scope="module")
def spot() -> dict[str, Any]:
    found: dict[str, Any] = figures.figures()["spot"]
    return found


@pytest.fixture(scope="module")
def sample(spot: dict[str, Any]) -> Sample:
    return Sample(spot["sample"], {}, spot["prompt"], spot["following"])


@pytest.fixture(scope="module")
def exact(sample: Sample) -> Iterator[Stored]:
    with tightfit.load("nano", "4GiB", context=context(sample), threads=1, **EXACT_WISH) as model:
        yield Stored([row.clone() for row in Reader(model).follow(sample.prompt, sample.following)])


def context(sample: Sample) -> int:
    return len(sample.prompt) + len(sample.following)


def measured(entry: Technique, sample: Sample, exact: Stored, task: str) -> dict[str, Any]:
    with tightfit.load("nano", "4GiB", context=context(sample), threads=1, **{entry.seam: entry.name}) as model:
        found: dict[str, Any] = parse_one("tasks", task).measure(Reader(model), sample, exact)
        return found


def stored(entry: Technique) -> dict[str, Any]:
    found = figures.of_technique(entry)
    assert found is not None
    return found


WITH = [entry for entry in MEASURED if figures.of_technique(entry) is not None]


# What must be fitted is fitted elsewhere, with more text than a test has time for.
@pytest.mark.parametrize("entry", [entry for entry in WITH if not issubclass(entry.cls, Fitted)], ids=named)
def test_a_sample_of_each_technique_is_as_it_was_measured(
    entry: Technique, spot: dict[str, Any], sample: Sample, exact: Stored
) -> None:
    found = measured(entry, sample, exact, spot["task"])
    assert agrees(found["kl"], stored(entry)["spot"]["kl"])


@pytest.mark.parametrize("one", ["int2", "int3", "int4", "int5", "int6"])
def test_a_format_that_took_its_neighbours_place_would_be_found(one: str) -> None:
    kl = {entry.name: stored(entry)["spot"]["kl"] for entry in WITH if entry.seam == "weights"}
    other = f"int{int(one[3:]) + 1}" if one != "int6" else "int8"
    assert not agrees(kl[one], kl[other])
    assert not agrees(kl[other], kl[one])


def test_every_technique_has_figures_or_a_reason_and_nothing_else_has() -> None:
    found = figures.figures()
    names = {(seam, name) for part in ("techniques", "missing") for seam in found[part] for name in found[part][seam]}
    assert names == {(entry.seam, entry.name) for entry in MEASURED}
    for entry in all_techniques():
        assert (figures.of_technique(entry) is None) == bool(figures.why_missing(entry))


def test_figures_are_of_the_embedded_model() -> None:
    with open_checkpoint(str(zoo.path())) as checkpoint:
        assert figures.figures()["fingerprint"] == checkpoint.fingerprint


def test_figures_have_intervals_around_their_values() -> None:
    for entry in WITH:
        for name, figure in stored(entry).items():
            if name not in ("configuration", "spot") and figure["low"] is not None:
                assert figure["low"] <= figure["value"] <= figure["high"], (named(entry), name)


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of every technique but kvsharer, which is refused."""
    monkeypatch.setattr(figures, "spot_sample", lambda experiment: SPOT)
    names = {seam: [entry.name for entry in MEASURED if entry.seam == seam] for seam in figures.SEAMS}
    return folders.write(
        tmp_path / "results",
        weights={name: folders.WEIGHTS.get(name, (9.0, 0.9, 0.01)) for name in names["weights"] if name != "f32"},
        kv={"none": folders.KV["none"]}
        | {name: folders.KV.get(name, (9.0, 0.9, 0.01)) for name in names["kv"] if name != "kvsharer"},
        unfinished=None,
    )


def test_figures_are_made_from_a_folder(whole: Path, tmp_path: Path) -> None:
    figures.main([str(whole), "--out", str(tmp_path / "figures.json")])
    made = json.loads((tmp_path / "figures.json").read_text())
    assert made.keys() == figures.figures().keys()
    assert "Find them with `tightfit fit`" in made["missing"]["kv"]["kvsharer"]
    int4 = made["techniques"]["kv"]["int4"]
    assert int4.keys() == stored(next(entry for entry in WITH if named(entry) == "kv=int4")).keys()
    assert int4["cache_share"]["value"] == pytest.approx(6.2 / 16, rel=1e-3)
    assert int4["speed_ratio"]["value"] == pytest.approx(1 / 0.92, rel=0.1)
    bits = made["techniques"]["weights"]["int4"]["bits_per_weight"]["value"]
    assert bits == pytest.approx(7.0 * 2**20 * 8 / 13e6, rel=1e-3)


def test_a_folder_that_lacks_a_technique_makes_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "spot_sample", lambda experiment: SPOT)
    folder = folders.write(tmp_path, unfinished=None)
    with pytest.raises(UsageError, match="was not measured"):
        figures.make([folder])


def test_folders_that_were_measured_differently_make_no_figures(whole: Path, tmp_path: Path) -> None:
    other = folders.write(tmp_path / "other", unfinished=None)
    experiment = json.loads((other / "experiment.json").read_text())
    (other / "experiment.json").write_text(json.dumps(experiment | {"seed": 8}))
    with pytest.raises(UsageError, match="another seed"):
        figures.make([whole, other])


def test_the_spot_sample_is_the_first_of_the_shortest_that_methods_do_something_on(tmp_path: Path) -> None:
    with open_checkpoint(str(zoo.path())) as checkpoint:
        material = Material.read(checkpoint.tokenizer(), zoo.path())
    of_folder = Results.open(folders.write(tmp_path, weights={}, kv={})).experiment
    experiment = dataclasses.replace(of_folder, text=[dataclasses.asdict(source) for source in material.sources])
    found = figures.spot_sample(experiment)
    assert found["sample"] == "1024/0"
    assert (len(found["prompt"]), len(found["following"])) == (1024, 64)
    other = dataclasses.replace(experiment, text=[dataclasses.asdict(Source("other.py", "0"))])
    with pytest.raises(UsageError, match="not here"):
        figures.spot_sample(other)
