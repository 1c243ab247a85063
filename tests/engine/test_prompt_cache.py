"""The prompt cache in a run: the same tokens with and without it, alone, in batches and conversations, after a restart;
what it holds is part of the plan and of the receipt; and nothing of another plan or model is ever found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import tiny_llama

import tightfit
from tightfit.decode.params import SamplingParams
from tightfit.decode.sample import Sampler
from tightfit.engine.generate import Completion, Request
from tightfit.engine.start import bits_of
from tightfit.kv.reuse.memory import OBJECTS
from tightfit.plan.schema import Numerics, Plan

CHUNK, CONTEXT = 64, 512
LISTING = "import os\nimport sys\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n\n" * 15
PROMPTS = [LISTING + "    def read(self):\n", LISTING + "    def close(self):\n", LISTING[:700] + "x = 1\n"]
COMMON: dict[str, Any] = {"memory": "2GiB", "context": CONTEXT, "chunk": CHUNK}
KV = [
    None,
    "window(keep=128)",
    "h2o(keep=128)",
    "snapkv(keep=128,budget=adakv)+int4(recent=32)+host(resident=64)",
    "int8",
    "think+quest(tokens=128)",
    "d2o(keep=128)",
]


@pytest.fixture(scope="module")
def plain() -> Iterator[tightfit.Model]:
    """The embedded model without a prompt cache."""
    with tightfit.load("nano", batch=3, **COMMON) as loaded:
        yield loaded


@pytest.fixture
def model() -> Iterator[tightfit.Model]:
    """The same with a new one."""
    with tightfit.load("nano", batch=3, prompt_cache="16MiB", **COMMON) as loaded:
        yield loaded


def logits_of(model: tightfit.Model, prompt: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Completion, list[bytes]]:
    """What follows on a prompt, and the bits of the logits of each token."""
    seen: list[bytes] = []
    sample = Sampler.sample

    def watch(sampler: Sampler, logits: Any, tokens: list[int]) -> int:
        seen.append(logits.numpy().tobytes())
        return sample(sampler, logits, tokens)

    with monkeypatch.context() as patched:
        patched.setattr(Sampler, "sample", watch)
        return model.generate(prompt, max_new_tokens=40, temperature=0), seen


@pytest.mark.parametrize("kv", KV)
def test_tokens_and_logits_are_the_same_with_and_without_it(
    kv: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tightfit.load("nano", kv=kv, **COMMON) as model:
        expected = [logits_of(model, prompt, monkeypatch) for prompt in PROMPTS]
    kept = {"prompt_cache": "16MiB", "prompt_cache_disk": "64MiB", "prompt_cache_dir": str(tmp_path)}
    reused = []
    for _ in range(2):  # the second time after a restart
        with tightfit.load("nano", kv=kv, **COMMON, **kept) as model:
            for prompt, (completion, bits) in zip(PROMPTS, expected, strict=True):
                found, found_bits = logits_of(model, prompt, monkeypatch)
                assert found.tokens == completion.tokens
                assert found_bits == bits
                reused.append(found.reused_tokens)
            receipt = model.receipt()["prompt_cache"]
            assert receipt["reused_tokens"] == sum(reused[-3:])
            assert receipt["damaged"] == receipt["unwritten"] == 0
    assert reused[0] == 0
    assert reused[1] == reused[3] == reused[4] > 200
    assert reused[5] > 100
    assert receipt["disk_hits"] > 0


def test_the_later_of_several_prompts_find_what_the_first_computed(
    model: tightfit.Model, plain: tightfit.Model
) -> None:
    expected = plain.generate(PROMPTS[:2] * 2, max_new_tokens=12)
    found = model.generate(PROMPTS[:2] * 2, max_new_tokens=12)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    whole = found[0].prompt_tokens // CHUNK * CHUNK
    assert [one.reused_tokens for one in found] == [0] + [whole] * 3
    computed = sum(one.prompt_tokens - one.reused_tokens for one in found)
    assert model._generator.timing.prefill_tokens == computed


def test_a_conversation_that_is_kept_goes_first(model: tightfit.Model, plain: tightfit.Model) -> None:
    tokens = model.tokenizer.encode(PROMPTS[0])
    first, second, fresh = Completion(), Completion(), Completion()
    list(model._generator.run([Request(tokens, 10, SamplingParams())], [first], conversation=True))
    longer = tokens + first.tokens + model.tokenizer.encode(LISTING)[:30]
    list(model._generator.run([Request(longer, 10, SamplingParams())], [second], conversation=True))
    assert second.reused_tokens == len(tokens) + len(first.tokens) - 1  # all that was computed, not only whole chunks
    # What decoding computed is not mistaken for a prompt's.
    list(model._generator.run([Request(longer, 10, SamplingParams())], [fresh]))
    assert fresh.reused_tokens == len(tokens) // CHUNK * CHUNK
    expected = Completion()
    list(plain._generator.run([Request(longer, 10, SamplingParams())], [expected]))
    assert fresh.tokens == expected.tokens


def test_scores_are_computed_from_the_start(model: tightfit.Model, plain: tightfit.Model) -> None:
    tokens = model.tokenizer.encode(PROMPTS[0])
    model.generate(PROMPTS[0], max_new_tokens=1)
    assert model.score(tokens) == plain.score(tokens)
    assert model.generate(PROMPTS[0], max_new_tokens=4).tokens == plain.generate(PROMPTS[0], max_new_tokens=4).tokens


def test_a_stream_that_is_closed_leaves_what_it_computed(model: tightfit.Model, plain: tightfit.Model) -> None:
    stream = model.stream(PROMPTS[0], max_new_tokens=50)
    next(stream)
    stream.close()
    found = model.generate(PROMPTS[0], max_new_tokens=12)
    assert found.reused_tokens > 200
    assert found.tokens == plain.generate(PROMPTS[0], max_new_tokens=12).tokens


def test_prompts_layer_by_layer_are_kept_where_everything_is(plain: tightfit.Model) -> None:
    with tightfit.load("nano", prompt_cache="16MiB", prefill="layered", **COMMON) as model:
        first, second = (model.generate(prompt, max_new_tokens=12) for prompt in PROMPTS[:2])
        assert (first.reused_tokens, second.reused_tokens) == (0, second.prompt_tokens // CHUNK * CHUNK)
        assert second.tokens == plain.generate(PROMPTS[1], max_new_tokens=12).tokens
    with pytest.raises(tightfit.UsageError, match="layer by layer"):
        tightfit.load("nano", prompt_cache="16MiB", prefill="layered", kv="h2o(keep=128)", **COMMON)


def test_what_it_may_take_is_planned_and_not_exceeded(plain: tightfit.Model) -> None:
    entry = CHUNK * plain.plan.accounts["kv"] // (3 * CONTEXT)
    limit = 5 * (entry + OBJECTS) + 100
    with tightfit.load("nano", prompt_cache=limit, **COMMON) as model:
        without = plain.plan.accounts["kv"] // 3
        assert limit <= model.plan.accounts["kv"] - without < limit + 8192
        for number in range(4):
            model.generate(f"# {number}\n" + LISTING, max_new_tokens=1)
        receipt = model.receipt()
        assert receipt["prompt_cache"]["entries"] == 5
        assert receipt["prompt_cache"]["bytes"] == 5 * entry <= limit
        assert receipt["accounts"]["kv"]["peak_bytes"] <= receipt["accounts"]["kv"]["reserved_bytes"]
        # The newest are there, from their beginning.
        assert model.generate(f"# 3\n{LISTING}", max_new_tokens=1).reused_tokens == 5 * CHUNK
        assert model.generate(f"# 0\n{LISTING}", max_new_tokens=1).reused_tokens == 0


@pytest.mark.parametrize("kv", [None, "int4(recent=32)"])
@pytest.mark.parametrize("option", ["prompt_cache", "prompt_cache_disk"])
def test_a_limit_below_one_entry_is_refused_with_the_smallest_that_works(
    option: str, kv: str | None, tmp_path: Path
) -> None:
    where = {"prompt_cache_dir": str(tmp_path)} if option == "prompt_cache_disk" else {}
    with pytest.raises(tightfit.UsageError, match="does not hold one entry") as refused:
        tightfit.load("nano", kv=kv, **COMMON, **where, **{option: "1KiB"})
    smallest = refused.value.hint.rsplit(" ", 1)[1].rstrip(".")
    with tightfit.load("nano", kv=kv, **COMMON, **where, **{option: smallest}) as model:
        model.generate(PROMPTS[0], max_new_tokens=1)
        assert model.generate(PROMPTS[0], max_new_tokens=1).reused_tokens >= CHUNK


def test_chunks_are_chosen_so_that_prompts_can_be_found_again(tmp_path: Path) -> None:
    tiny = tiny_llama.write(tmp_path / "tiny")
    assert tightfit.load(str(tiny), "2GiB", context=200).plan.chunk > 200
    with tightfit.load(str(tiny), "2GiB", context=200, prompt_cache="1MiB") as model:
        assert model.plan.chunk == 128
    with pytest.raises(tightfit.UsageError, match="nothing to find again"):
        tightfit.load(str(tiny), "2GiB", context=64, chunk=64, prompt_cache="1MiB")


def test_a_folder_without_a_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tightfit.UsageError, match="how much may be kept"):
        tightfit.load("nano", prompt_cache_dir=str(tmp_path), **COMMON)


def test_a_plan_holds_it(tmp_path: Path, plain: tightfit.Model) -> None:
    kept = {"prompt_cache": "8MiB", "prompt_cache_disk": "64MiB", "prompt_cache_dir": str(tmp_path)}
    with tightfit.load("nano", **COMMON, **kept) as model:
        plan = Plan.model_validate(json.loads(model.plan.model_dump_json()))
        model.generate(PROMPTS[0], max_new_tokens=1)
    with tightfit.load("nano", plan=plan) as model:
        assert model.plan.prompt_cache == plan.prompt_cache
        assert model.plan.accounts["kv"] == plan.accounts["kv"]
        found = model.generate(PROMPTS[0], max_new_tokens=12)
        assert found.reused_tokens > 200
        assert found.tokens == plain.generate(PROMPTS[0], max_new_tokens=12).tokens
    assert plan.prompt_cache is not None
    small = plan.model_copy(update={"prompt_cache": plan.prompt_cache.model_copy(update={"memory": 1000})})
    with pytest.raises(tightfit.UsageError, match="does not hold one entry"):
        tightfit.load("nano", plan=small)


def test_another_plan_never_finds_anything(tmp_path: Path) -> None:
    """Models of the same shape and plans that differ in one thing, in one folder."""
    tiny, other = tiny_llama.write(tmp_path / "tiny"), tiny_llama.write(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    folder = tmp_path / "prompts"
    kept = {"prompt_cache_disk": "64MiB", "prompt_cache_dir": str(folder)}
    base: dict[str, Any] = {"memory": "2GiB", "context": 200, "chunk": 32, **kept}
    changes: list[tuple[Path, dict[str, Any]]] = [
        (tiny, {}),
        (other, {}),
        (tiny, {"chunk": 16}),
        (tiny, {"weights": "int8"}),
        (tiny, {"weights": "int8", "activations": "float32"}),
        (tiny, {"prefill": "layered"}),
        (tiny, {"kv": "int8"}),
        (tiny, {"kv": "int8(recent=64)"}),
        (tiny, {"kv": "int8", "context": 220}),
    ]
    prompt = "#" + "7" * 150
    for at, (model, change) in enumerate(changes):
        with tightfit.load(str(model), **base | change) as loaded:
            first = loaded.generate(prompt, max_new_tokens=2)
            assert first.reused_tokens == 0, changes[at]
    for model, change in changes:  # and each finds its own
        with tightfit.load(str(model), **base | change) as loaded:
            assert loaded.generate(prompt, max_new_tokens=2).reused_tokens > 0
    # What does not change the bits finds it too.
    with tightfit.load(str(tiny), **base | {"context": 250, "batch": 2}) as loaded:
        assert loaded.generate(prompt, max_new_tokens=2).reused_tokens > 0


def test_what_fixes_the_bits_is_part_of_every_name(plain: tightfit.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plain.plan
    numerics: Numerics = plan.numerics
    other_gemm = "float32" if numerics.gemm == "bfloat16" else "bfloat16"
    changed = [
        plan,
        plan.model_copy(update={"numerics": numerics.model_copy(update={"gemm": other_gemm})}),
        plan.model_copy(update={"numerics": numerics.model_copy(update={"kv": "float16"})}),
        plan.model_copy(update={"threads": plan.threads + 1}),
        plan.model_copy(update={"outer": plan.outer.model_copy(update={"format": "int8"})}),
        plan.model_copy(update={"model": plan.model.model_copy(update={"fingerprint": "0" * 64})}),
    ]
    roots = {bits_of(one) for one in changed}
    assert len(roots) == len(changed)
    assert bits_of(plan.model_copy(update={"context": 77, "budget": 7, "sequences": 9})) == bits_of(plan)
    monkeypatch.setattr("tightfit.engine.start.versions", lambda: {"tightfit": "another"})
    assert bits_of(plan) not in roots
