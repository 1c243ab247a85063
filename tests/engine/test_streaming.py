"""Streamed weights give the bits of resident ones, in less memory, whatever happens to the files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import tiny_llama

import tightfit
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.checkpoints.positioned import PositionedFile
from tightfit.engine.compress import compress
from tightfit.engine.opening import Wish, open_model, plan_for
from tightfit.errors import CheckpointError
from tightfit.plan.schema import Plan

PROMPTS = [
    "def fibonacci(n):\n    if n < 2:\n",
    "import os\nimport sys\n\nclass Reader:\n    def __init__(self, path):\n" * 4,
]


@pytest.fixture(scope="module", params=["checkpoint", "int4", "pruned"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model as it is, or compressed."""
    if request.param == "checkpoint":
        return "nano"
    return str(compressed("nano", request.param, tmp_path_factory.mktemp("models") / request.param))


def compressed(model: str, weights: str, out: Path) -> Path:
    wish = Wish(model, "2GiB")
    opened = open_model(wish)
    with opened.checkpoint:
        compress(wish, opened, weights, out)
    return out


def resident_plan(model: str) -> Plan:
    wish = Wish(model, "2GiB", context=256, batch=2, chunk=64)
    opened = open_model(wish)
    with opened.checkpoint:
        return plan_for(wish, opened)


def streamed(plan: Plan, resident: int, buffers: int = 2) -> Plan:
    layers = [layer.model_copy(update={"placement": "streamed", "resident": resident}) for layer in plan.layers]
    return plan.model_copy(update={"layers": tuple(layers), "buffers": buffers})


@pytest.mark.parametrize(("resident", "buffers"), [(2, 1), (2, 3), (5, 2), (8, 2)])
def test_text_and_scores_are_those_of_resident_weights(model: str, resident: int, buffers: int) -> None:
    plan = resident_plan(model)
    answers = []
    for chosen in (plan, streamed(plan, resident, buffers)):
        with tightfit.load(model, plan=chosen) as loaded:
            texts = [one.tokens for one in loaded.generate(PROMPTS, max_new_tokens=20, ignore_eos=True)]
            answers.append((texts, loaded.score(loaded.tokenizer.encode(PROMPTS[1]))))
            receipt = loaded.receipt()
        assert (receipt["decode_streamed_bytes_per_token"] is None) == (chosen is plan)
    assert answers[0] == answers[1]


def test_less_stays_in_memory_and_less_is_read_the_more_stays(model: str) -> None:
    plan = resident_plan(model)
    accounts, read = [plan.accounts["weights"]], [0.0]
    for resident in (8, 5, 2):
        with tightfit.load(model, plan=streamed(plan, resident, buffers=1)) as loaded:
            loaded.generate(PROMPTS[0], max_new_tokens=4, ignore_eos=True)
            accounts.append(loaded.plan.accounts["weights"])
            read.append(loaded.receipt()["decode_streamed_bytes_per_token"])
    assert sorted(read) == read
    assert accounts[1] > accounts[2] > accounts[3]


def test_a_batch_and_a_chunk_share_one_pass_over_the_weights(model: str) -> None:
    plan = streamed(resident_plan(model), 2)
    with tightfit.load(model, plan=plan) as loaded:
        loaded.generate(PROMPTS[0], max_new_tokens=8, ignore_eos=True)
        alone = loaded.receipt()["decode_streamed_bytes_per_token"]
    with tightfit.load(model, plan=plan) as loaded:
        loaded.generate([PROMPTS[0]] * 2, max_new_tokens=8, ignore_eos=True)
        receipt = loaded.receipt()
    assert receipt["decode_streamed_bytes_per_token"] == pytest.approx(alone / 2, rel=0.01)
    assert receipt["prefill_streamed_bytes_per_token"] < alone / 10


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_text(tmp_path: Path) -> None:
    folder = tiny_llama.write(tmp_path / "tiny")
    plan = streamed(resident_plan(str(folder)), 2)
    with tightfit.load(str(folder), plan=plan) as loaded:
        loaded.generate("a", max_new_tokens=2, ignore_eos=True)
        [file] = folder.glob("*.safetensors")
        with open(file, "r+b") as opened:
            opened.truncate(1000)
        with pytest.raises(CheckpointError, match="shrank while in use"):
            loaded.generate("a", max_new_tokens=8, ignore_eos=True)


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[Callable[[], list[int]]]:
    """What a streamed model answers, each time it is asked: the same."""
    folder = tiny_llama.write(tmp_path / "tiny")
    with tightfit.load(str(folder), plan=streamed(resident_plan(str(folder)), 2)) as loaded:
        yield lambda: loaded.generate("import os", max_new_tokens=8, ignore_eos=True).tokens


@pytest.mark.parametrize("weights", ["own", "int4", "pruned"])
def test_embeddings_stay_on_the_disk_unless_they_are_the_head(tmp_path: Path, weights: str) -> None:
    placements = []
    for tied in (False, True):
        folder = tiny_llama.write(tmp_path / str(tied), tie_word_embeddings=tied)
        if weights != "own":
            folder = compressed(str(folder), weights, tmp_path / f"{tied}-{weights}")
        plan = resident_plan(str(folder))
        texts = []
        for chosen in (plan, streamed(plan, 2)):
            with tightfit.load(str(folder), plan=chosen) as loaded:
                texts.append(loaded.generate(PROMPTS, max_new_tokens=8, ignore_eos=True)[1].tokens)
                placements.append(loaded.plan.outer.placement)
        assert texts[0] == texts[1]
    assert placements == ["resident", "streamed", "resident", "resident"]


def test_a_read_that_fails_is_an_error_and_the_next_request_tries_again(
    answers: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers()
    read, failing = Checkpoint.read_into, [5]

    def fails(self: Checkpoint, *arguments: Any, **options: Any) -> None:
        failing[0] -= 1
        if failing[0] == 0:
            raise CheckpointError("the disk gave up", "Buy another.")
        read(self, *arguments, **options)

    monkeypatch.setattr(Checkpoint, "read_into", fails)
    with pytest.raises(CheckpointError, match="gave up"):
        answers()
    assert answers() == expected


def test_reads_that_are_slow_or_short_change_nothing(
    answers: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers()
    read = PositionedFile.read_some

    def short(self: PositionedFile, position: int, view: memoryview, again: bool) -> int:
        time.sleep(0.001)
        return read(self, position, view[: max(len(view) // 2, 1)], again)

    monkeypatch.setattr(PositionedFile, "read_some", short)
    assert answers() == expected


def test_a_file_that_is_replaced_is_read_to_the_end(answers: Callable[[], list[int]], tmp_path: Path) -> None:
    expected = answers()
    [file] = (tmp_path / "tiny").glob("*.safetensors")
    other = tmp_path / "other"
    other.write_bytes(bytes(file.stat().st_size))
    other.replace(file)
    assert answers() == expected
