"""What --vary says becomes configurations: products of alternatives, each written in one way; mistakes are found at
once."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from tightfit.catalog import all_techniques
from tightfit.errors import UsageError
from tightfit.lab.experiment import Configuration, Experiment, configurations


def keys(*varied: str, **common: object) -> list[str]:
    return [each.key for each in configurations(varied, common, None)]


def test_lists_multiply_and_the_exact_model_comes_first() -> None:
    found = keys("kv=[none, snapkv(keep=256,budget=uniform)+int4]", "weights=[int8,int4(group=64)]")
    assert found == [
        "exact",
        "kv=none, weights=int8",
        "kv=none, weights=int4(group=64)",
        "kv=snapkv(keep=256)+int4, weights=int8",  # settings at their defaults are left out
        "kv=snapkv(keep=256)+int4, weights=int4(group=64)",
    ]


def test_alternatives_are_taken_one_at_a_time() -> None:
    assert keys("weights=int8; kv=[none,int4]") == ["exact", "weights=int8", "kv=none", "kv=int4"]
    assert keys("weights=int8;kv=int4", "context=[256,512]")[1:] == [
        "weights=int8, context=256",
        "weights=int8, context=512",
        "kv=int4, context=256",
        "kv=int4, context=512",
    ]


def test_what_is_common_holds_unless_it_is_varied() -> None:
    exact, of_weights, of_kv = configurations(
        ["weights=int8;kv=int4"], {"kv": "int8", "memory": "1GiB", "threads": 1, "chunk": None}, None
    )
    assert of_weights.wish == {"kv": "int8", "memory": "1GiB", "threads": 1, "weights": "int8"}
    assert of_kv.wish == {"kv": "int4", "memory": "1GiB", "threads": 1}
    assert (of_weights.vary, of_kv.vary) == ({"weights": "int8"}, {"kv": "int4"})
    # It need not fit into the budget of the others.
    assert exact.wish == {"threads": 1, "weights": "f32", "activations": "float32", "kv": "none"}


def test_the_exact_model_can_be_another() -> None:
    exact = configurations(["kv=int4"], {}, "weights=bf16, memory=2GiB")[0]
    assert exact.wish == {"weights": "bf16", "activations": "float32", "kv": "none", "memory": "2GiB"}


def test_all_stands_for_every_technique_of_a_seam() -> None:
    for seam in ("weights", "kv"):
        known = {f"{seam}={entry.name}" for entry in all_techniques() if entry.seam == seam}
        assert set(keys(f"{seam}=all")) == known | {"exact"}
    assert keys("kv=[none,all]")[1] == "kv=none"


def test_the_same_configuration_is_measured_once() -> None:
    assert keys("kv=[int4,none,int4(recent=128)]", "chunk=64") == ["exact", "kv=int4, chunk=64", "kv=none, chunk=64"]


def test_without_anything_varied_there_is_what_is_given() -> None:
    assert keys(kv="int4") == ["exact", "as given"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("kv", "cannot read"),
        ("kv=", "cannot read"),
        ("colour=red", "'colour' cannot be varied"),
        ("kv=[non]", "unknown technique 'non'"),
        ("kv=int4+int8", "both"),
        ("weights=[int8,]", "unknown technique ''"),
        ("context=long", "'long'"),
        ("memory=much", "'much'"),
        ("prefill=fast", "'fast'"),
        ("activations=int4", "'int4'"),
        ("kv=snapkv(keep=1", "parentheses"),
        ("context=all", "'all'"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(text: str, part: str) -> None:
    with pytest.raises(UsageError) as found:
        keys(text)
    assert part in found.value.message


def test_a_name_is_varied_once() -> None:
    with pytest.raises(UsageError, match="kv is varied twice"):
        keys("kv=int4", "weights=int8;kv=none")


EXPERIMENT = Experiment(
    model="nano",
    fingerprint="f",
    tasks=["lookup"],
    seed=0,
    context=512,
    text=[{"name": "a.py", "sha256": "0"}],
    common={"memory": "1GiB"},
    configurations=[Configuration("exact", {}, {"kv": "none"}), Configuration("kv=int4", {"kv": "int4"}, {})],
    machine={"cores": "2"},
    versions={"python": "3"},
    command="tightfit lab run",
)


def test_an_experiment_is_read_as_it_was_written() -> None:
    assert Experiment.of_json(json.loads(EXPERIMENT.to_json())) == EXPERIMENT
    with pytest.raises(KeyError):
        Experiment.of_json(asdict(EXPERIMENT) | {"version": 2})


def test_what_differs_between_experiments_is_named() -> None:
    assert EXPERIMENT.difference(replace(EXPERIMENT, command="other")) is None
    assert EXPERIMENT.difference(replace(EXPERIMENT, seed=1)) == "seed: 0 there, 1 here"
    other = replace(EXPERIMENT, configurations=EXPERIMENT.configurations[:1])
    assert EXPERIMENT.difference(other) == "configurations: ['kv=int4 {}'] there, [] here"
