"""Streamed weights give the bits of resident ones, in less memory, whatever happens to the files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests import tiny_llama

import tightfit
from tightfit.budget.ledger import PAGE
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.checkpoints.positioned import PositionedFile
from tightfit.engine.compress import compress
from tightfit.engine.opening import Wish, open_model, plan_for
from tightfit.errors import CheckpointError, UsageError
from tightfit.plan.schema import Plan

PROMPTS = [
    "def fibonacci(n):\n    if n < 2:\n",
    "import os\nimport sys\n\nclass Reader:\n    def __init__(self, path):\n" * 4,
]


MODELS = ("nano", "nano int4", "nano int8", "untied", "untied int4", "untied pruned", "40-shards")


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model, whose embeddings are its head, or one that has a head; as it is, or compressed."""
    name, _, weights = request.param.partition(" ")
    folder = tmp_path_factory.mktemp("models")
    if name == "untied":
        name = str(tiny_llama.write(folder / name, vocab=6150))  # the last 16 rows are not whole
    elif name == "40-shards":
        name = str(tiny_llama.write(folder / name, shards=40, layers=5))
    return str(compressed(name, weights, folder / weights)) if weights else name


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


def streamed(plan: Plan, resident: int, buffers: int = 2, rows: int | None = None) -> Plan:
    layers = [layer.model_copy(update={"placement": "streamed", "resident": resident}) for layer in plan.layers]
    outer = plan.outer.model_copy(update={"resident": rows})
    return plan.model_copy(update={"layers": tuple(layers), "outer": outer, "buffers": buffers})


def answer(model: str, plan: Plan) -> tuple[list[list[int]], list[float]]:
    """Tokens and scores."""
    with tightfit.load(model, plan=plan) as loaded:
        texts = [one.tokens for one in loaded.generate(PROMPTS, max_new_tokens=20, ignore_eos=True)]
        scores = loaded.score(loaded.tokenizer.encode(PROMPTS[1]))
        assert (loaded.receipt()["decode_streamed_bytes_per_token"] is None) == (not plan.streamed)
        assert loaded.plan.outer.resident == plan.outer.resident
    return texts, scores


@pytest.fixture(scope="module")
def expected(model: str) -> tuple[list[list[int]], list[float]]:
    return answer(model, resident_plan(model))


@pytest.mark.parametrize(
    ("resident", "buffers", "rows"),
    [(2, 2, None), (2, 3, 0), (8, 3, 4096), (9, 1, 6128)],
)
def test_text_and_scores_are_those_of_resident_weights(
    model: str, expected: Any, resident: int, buffers: int, rows: int | None
) -> None:
    assert answer(model, streamed(resident_plan(model), resident, buffers, rows)) == expected


@pytest.mark.parametrize("model", ["nano", "untied int4"], indirect=True)
def test_less_stays_in_memory_and_less_is_read_the_more_stays(model: str) -> None:
    plan = resident_plan(model)
    accounts, read = [plan.accounts["weights"]], [0.0]
    for resident, rows in ((8, None), (5, None), (5, 4096), (5, 1024), (2, 1024), (2, 0)):
        with tightfit.load(model, plan=streamed(plan, resident, buffers=1, rows=rows)) as loaded:
            loaded.generate(PROMPTS[0], max_new_tokens=4, ignore_eos=True)
            accounts.append(loaded.plan.accounts["weights"])
            read.append(loaded.receipt()["decode_streamed_bytes_per_token"])
    assert sorted(read) == read
    assert len(set(read)) > 4
    # All but what rounding up to whole pages hides in the smallest model.
    assert all(after <= before + PAGE for before, after in pairwise(accounts[1:]))


@pytest.mark.parametrize("model", ["nano", "untied int4"], indirect=True)
def test_a_batch_and_a_chunk_share_one_pass_over_the_weights(model: str) -> None:
    plan = streamed(resident_plan(model), 2, rows=0)
    with tightfit.load(model, plan=plan) as loaded:
        loaded.generate(PROMPTS[0], max_new_tokens=8, ignore_eos=True)
        alone = loaded.receipt()["decode_streamed_bytes_per_token"]
    with tightfit.load(model, plan=plan) as loaded:
        loaded.generate([PROMPTS[0]] * 2, max_new_tokens=8, ignore_eos=True)
        receipt = loaded.receipt()
    assert receipt["decode_streamed_bytes_per_token"] == pytest.approx(alone / 2, rel=0.01)
    assert receipt["prefill_streamed_bytes_per_token"] < alone / 10


@pytest.mark.parametrize("model", ["nano int4", "untied", "40-shards"], indirect=True)
def test_the_head_is_read_only_where_logits_are_wanted(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = [0]
    read_into = Checkpoint.read_into

    def counting(self: Checkpoint, info: Any, start: int, buffer: Any, again: bool = False) -> None:
        read[0] += 0 if again else memoryview(buffer).nbytes  # embeddings are read again
        read_into(self, info, start, buffer, again)

    plan = resident_plan(model)
    prompt = "#" + "7" * 230
    used = []
    for rows in (None, 0):
        with tightfit.load(model, plan=streamed(plan, 2, rows=rows)) as loaded:
            monkeypatch.setattr(Checkpoint, "read_into", counting)
            read[0] = 0
            before = loaded.generate(prompt, max_new_tokens=1).prompt_tokens
            monkeypatch.setattr(Checkpoint, "read_into", read_into)
            used.append(loaded.receipt()["prefill_streamed_bytes_per_token"] * before)
            ahead = read[0] - used[-1]
    assert before > 3 * plan.chunk  # so that three chunks want no logits
    head = plan.outer.nbytes // (1 if model_is_tied(model) else 2)
    assert used[1] - used[0] == pytest.approx(head, rel=0.05)  # once, for the last token of the last chunk
    # What is read and not used is what has been read ahead for the next token: two layers at most.
    layer = plan.layers[0].nbytes
    assert ahead <= 2 * layer


def model_is_tied(model: str) -> bool:
    with open_model(Wish(model, "2GiB")).checkpoint as checkpoint:
        return bool(checkpoint.config["tie_word_embeddings"])


@pytest.mark.parametrize(("rows", "resident", "part"), [(17, 2, "17 rows"), (6160, 2, "6160 rows"), (0, 10, "layer 0")])
def test_a_plan_whose_numbers_make_no_sense_is_refused(rows: int, resident: int, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        tightfit.load("nano", plan=streamed(resident_plan("nano"), resident, rows=rows))


def test_a_head_with_a_header_stays(tmp_path: Path) -> None:
    wish = Wish("nano", "2GiB")
    opened = open_model(wish)
    with opened.checkpoint:
        compress(wish, opened, "fp8", tmp_path / "fp8")
    plan = resident_plan(str(tmp_path / "fp8"))
    assert answer(str(tmp_path / "fp8"), streamed(plan, 2)) == answer(str(tmp_path / "fp8"), plan)
    with pytest.raises(UsageError, match="Of this head 6144 to 6144 rows can stay"):
        tightfit.load(str(tmp_path / "fp8"), plan=streamed(plan, 2, rows=0))


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


@pytest.fixture(params=[None, 0], ids=["the head stays", "the head streams"])
def answers(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[], list[int]]]:
    """What a streamed model answers, each time it is asked: the same."""
    folder = tiny_llama.write(tmp_path / "tiny")
    with tightfit.load(str(folder), plan=streamed(resident_plan(str(folder)), 2, rows=request.param)) as loaded:
        yield lambda: loaded.generate("import os", max_new_tokens=8, ignore_eos=True).tokens


@pytest.mark.parametrize("weights", ["own", "int4", "pruned"])
def test_embeddings_stay_on_the_disk_unless_they_are_a_head_that_stays(tmp_path: Path, weights: str) -> None:
    placements = []
    for tied in (False, True):
        folder = tiny_llama.write(tmp_path / str(tied), tie_word_embeddings=tied)
        if weights != "own":
            folder = compressed(str(folder), weights, tmp_path / f"{tied}-{weights}")
        plan = resident_plan(str(folder))
        texts = []
        for chosen in (plan, streamed(plan, 2), streamed(plan, 2, rows=0)):
            with tightfit.load(str(folder), plan=chosen) as loaded:
                texts.append(loaded.generate(PROMPTS, max_new_tokens=8, ignore_eos=True)[1].tokens)
                placements.append(loaded.plan.outer.placement)
        assert texts[0] == texts[1] == texts[2]
    assert placements == ["resident", "streamed", "streamed", "resident", "resident", "streamed"]


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
