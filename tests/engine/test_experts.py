"""Mixtures whose experts do not fit give the text of those that do, whatever happens to the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests import random_model

import tightfit
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.engine.compress import compress
from tightfit.engine.opening import Wish, open_model, plan_for
from tightfit.errors import CheckpointError, UsageError
from tightfit.plan.schema import ExpertsPlan, Plan

PROMPTS = ["def fibonacci(n):\n    if n < 2:\n", "import os\nimport sys\n\nclass Reader:\n"]
LAYERS, EXPERTS, CHOSEN = 3, 16, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small mixture in int4."""
    folder = tmp_path_factory.mktemp("models")
    wish = Wish(str(random_model.write(folder / "model", "tiny-moe")), "2GiB")
    opened = open_model(wish)
    with opened.checkpoint:
        compress(wish, opened, "int4", folder / "int4")
    return str(folder / "int4")


@pytest.fixture(scope="module")
def resident(model: str) -> Plan:
    wish = Wish(model, "2GiB", context=256, batch=2, chunk=64)
    opened = open_model(wish)
    with opened.checkpoint:
        return plan_for(wish, opened)


def cached(plan: Plan, slots: int, policy: str = "score+gate") -> Plan:
    """The same with so many experts in memory, and everything else."""
    others = 6 + 1  # norms of a layer, q, k, v, o, and the router
    layers = [layer.model_copy(update={"placement": "streamed", "resident": others}) for layer in plan.layers]
    return plan.model_copy(update={"layers": tuple(layers), "experts": ExpertsPlan(policy=policy, slots=slots)})


def answer(
    model: str, plan: Plan, prompts: list[str] = PROMPTS, new: int = 16
) -> tuple[list[list[int]], dict[str, Any]]:
    with tightfit.load(model, plan=plan) as loaded:
        done = loaded.generate(prompts, max_new_tokens=new, ignore_eos=True, temperature=1.0, seed=1)
        return [one.tokens for one in done], loaded.receipt()


@pytest.mark.parametrize("slots", [2, 12, LAYERS * EXPERTS])
@pytest.mark.parametrize("policy", ["lru", "score+gate"])
def test_text_is_that_of_experts_in_memory(model: str, resident: Plan, slots: int, policy: str) -> None:
    expected, receipt = answer(model, resident)
    assert receipt["decode_experts"] is None
    found, receipt = answer(model, cached(resident, slots, policy))
    assert found == expected
    assert receipt["decode_experts"]["used"] > 0
    assert receipt["accounts"]["experts"]["peak_bytes"] <= receipt["accounts"]["experts"]["reserved_bytes"]


def test_more_slots_are_more_hits_and_less_reading(model: str, resident: Plan) -> None:
    rates, read = [], []
    for slots in (2, 24, 40, LAYERS * EXPERTS):
        receipt = answer(model, cached(resident, slots, "lru"), PROMPTS[:1], 40)[1]
        rates.append(receipt["decode_experts"]["hit_rate"])
        read.append(receipt["decode_streamed_bytes_per_token"] or 0.0)
    assert rates == sorted(rates)
    assert read == sorted(read, reverse=True)
    assert rates[0] == 0.0
    assert rates[-1] > 0.9  # each is read once


def test_reading_ahead_turns_misses_into_hits(model: str, resident: Plan) -> None:
    without = answer(model, cached(resident, 30, "lru"), PROMPTS[:1], 40)[1]["decode_experts"]
    ahead = answer(model, cached(resident, 30, "lru+gate"), PROMPTS[:1], 40)[1]["decode_experts"]
    assert ahead["foreseen_rate"] > 0.3
    assert ahead["hit_rate"] + ahead["late_rate"] > without["hit_rate"]
    assert without["late_rate"] == without["foreseen_rate"] == 0.0


def test_sequences_of_a_step_share_the_reads_of_an_expert(model: str, resident: Plan) -> None:
    _, alone = answer(model, cached(resident, 2, "lru"), PROMPTS[:1])
    _, together = answer(model, cached(resident, 2, "lru"), [PROMPTS[0]] * 2)
    reads = [receipt["decode_streamed_bytes_per_token"] for receipt in (alone, together)]
    assert reads[1] == pytest.approx(reads[0] / 2, rel=0.01)
    # A prompt of 20 tokens reads each expert once, not eight for each token.
    assert alone["prefill_streamed_bytes_per_token"] < alone["decode_streamed_bytes_per_token"] / 3


def test_a_read_that_fails_is_an_error_and_the_next_request_tries_again(
    model: str, resident: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tightfit.load(model, plan=cached(resident, 4)) as loaded:
        options: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True, "temperature": 0}
        expected = loaded.generate(PROMPTS[0], **options).tokens
        read, left = Checkpoint.read_into, [20]

        def fails(self: Checkpoint, *arguments: Any, **named: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise CheckpointError("the disk gave up", "Buy another.")
            read(self, *arguments, **named)

        monkeypatch.setattr(Checkpoint, "read_into", fails)

        def until_one_is_wanted() -> None:
            """What was only read ahead may never be."""
            for _ in range(20):
                left[0] = 20
                loaded.generate(PROMPTS[0], **options)

        with pytest.raises(CheckpointError, match="gave up"):
            until_one_is_wanted()
        assert loaded.generate(PROMPTS[0], **options).tokens == expected


def test_a_file_that_shrinks_is_an_error_and_no_text(resident: Plan, tmp_path: Path) -> None:
    folder = random_model.write(tmp_path / "model", "tiny-moe")
    wish = Wish(str(folder), "2GiB", context=256, chunk=64)
    opened = open_model(wish)
    with opened.checkpoint:
        plan = cached(plan_for(wish, opened), 4)
    with tightfit.load(str(folder), plan=plan) as loaded:
        loaded.generate("a", max_new_tokens=2, ignore_eos=True)
        [file] = folder.glob("*.safetensors")
        with open(file, "r+b") as shorter:
            shorter.truncate(100_000)
        with pytest.raises(CheckpointError, match="shrank while in use"):
            loaded.generate("a", max_new_tokens=8, ignore_eos=True)


def test_a_census_is_kept_and_used(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="never counted"):
        tightfit.load(model, memory="4GiB", experts="static")
    with tightfit.load(model, memory="4GiB", context=64) as loaded:
        found = loaded.census(PROMPTS[0] * 20)
        assert found["tokens"] > 200  # several contexts
        loaded.generate("a", max_new_tokens=1)  # is not counted
    opened = open_model(Wish(model, "4GiB", experts="static"))
    opened.checkpoint.close()
    from tightfit.experts.census import read_census

    census = read_census("model", opened.checkpoint.fingerprint, LAYERS, EXPERTS)
    assert [sum(row) for row in census.shares] == pytest.approx([CHOSEN] * LAYERS)
    assert census.most_used_half() == found["most_used_half"]
    file = Path(found["file"])
    file.write_text(file.read_text()[:-20])
    with pytest.raises(CheckpointError, match="not a census"):
        tightfit.load(model, memory="4GiB", experts="static")


def test_what_makes_no_sense_is_refused_before_anything_is_loaded(model: str) -> None:
    with pytest.raises(UsageError, match="has no experts"):
        tightfit.load("nano", experts="lru")
    with pytest.raises(UsageError, match="unknown technique"):
        tightfit.load(model, experts="mru")
    with tightfit.load("nano", memory="4GiB") as loaded, pytest.raises(UsageError, match="has no experts"):
        loaded.census("text")
