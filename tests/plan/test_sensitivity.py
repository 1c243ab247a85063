"""What rounding costs is kept for one model, and assumed until it is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tightfit.plan.search import LEVELS
from tightfit.plan.sensitivity import (
    OUTER,
    Sensitivity,
    cache_prior,
    prior,
    read_sensitivity,
    sensitivity_file,
    write_sensitivity,
)

FINGERPRINT = "0123456789abcdef" * 4
LAYERS = 6


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    return tmp_path


def found() -> Sensitivity:
    weights = {group: {"int8": 0.001, "int4": 0.05} for group in prior(LAYERS).weights}
    return Sensitivity(weights, {"int4": 0.002}, measured=True, tokens=256)


def test_fewer_bits_are_assumed_to_lose_more_and_the_sum_is_that_of_the_whole() -> None:
    for layers in (1, 2, 80):
        assumed = prior(layers)
        for losses in assumed.weights.values():
            of_levels = [losses[level] for level in LEVELS[1:]]
            assert of_levels == sorted(of_levels)
            assert of_levels[0] > 0
        assert sum(losses["int4"] for losses in assumed.weights.values()) == pytest.approx(0.0358)
    assert assumed.weights["layers.0"]["int4"] > assumed.weights["layers.79"]["int4"]
    assert assumed.weights["layers.79"]["int4"] > assumed.weights["layers.40"]["int4"]


def test_caches_that_keep_fewer_tokens_are_assumed_to_lose_more() -> None:
    losses = [
        cache_prior(kv, 1000) or 0.0
        for kv in ("none", "int8", "int4", "snapkv(keep=512)+int4", "snapkv(keep=128)+int4")
    ]
    assert losses == sorted(losses)
    assert losses[0] == 0
    assert cache_prior("snapkv(keep=512)+int4", 100) == cache_prior("int4", 100)  # nothing is let go of
    assert cache_prior("quest", 1000) is None


def test_what_was_measured_is_found_again_and_completed() -> None:
    write_sensitivity(FINGERPRINT, found())
    read = read_sensitivity(FINGERPRINT, LAYERS)
    assert read.measured
    assert read.tokens == 256
    assert read.of(OUTER, "int4") == 0.05
    assert read.of("layers.3", "own") == 0
    assert read.of_cache("int4", 1000) == 0.002
    assert read.of_cache("int8", 1000) == cache_prior("int8", 1000)
    between = read.of("layers.3", "int5")  # was not measured
    assert between is not None
    assert 0.001 < between < 0.05
    assert read.of("layers.3", "pruned(keep=0.5)") is None


def test_another_model_is_assumed() -> None:
    write_sensitivity(FINGERPRINT, found())
    assert not read_sensitivity("f" * 64, LAYERS).measured
    assert not read_sensitivity(FINGERPRINT, LAYERS + 1).measured


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("weights"),
        lambda content: content["weights"].pop("layers.2"),
        lambda content: content["weights"]["layers.2"].update(int4=-1),
        lambda content: content["weights"]["layers.2"].update(int4="much"),
        lambda content: content["weights"].update({"layers.2": []}),
        lambda content: content.update(version=2),
        lambda content: content.update(cache=None),
    ],
)
def test_a_damaged_file_counts_as_none(change: object) -> None:
    file = write_sensitivity(FINGERPRINT, found())
    content = json.loads(file.read_text())
    change(content)  # type: ignore[operator]
    file.write_text(json.dumps(content))
    assert read_sensitivity(FINGERPRINT, LAYERS) == prior(LAYERS)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_a_file_that_is_no_json_counts_as_none(text: str) -> None:
    sensitivity_file(FINGERPRINT).write_text(text)
    assert read_sensitivity(FINGERPRINT, LAYERS) == prior(LAYERS)
