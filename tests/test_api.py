"""The Python interface: what docs/python.md shows, and what it promises beside."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests import tiny_llama

import tightfit

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
PROMPT = "def fibonacci(n):\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write(tmp_path_factory.mktemp("models") / "tiny", chat=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[tightfit.Model]:
    with tightfit.load(str(folder), memory="2GiB", batch=2) as loaded:
        yield loaded


def test_the_examples_of_the_documentation_run_as_they_stand() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    examples = "\n".join(block for block in blocks if block.startswith(">>>"))
    test = doctest.DocTestParser().get_doctest(examples, {}, PAGE.name, str(PAGE), 0)
    assert len(test.examples) > 25
    report: list[str] = []
    result = doctest.DocTestRunner().run(test, out=report.append)
    assert result.failed == 0, "".join(report)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, tightfit; tightfit.load; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_chat_computes_only_what_is_new(model: tightfit.Model) -> None:
    messages = [{"role": "user", "content": "write a loop"}]
    first = model.chat(messages, max_new_tokens=5, ignore_eos=True)
    assert first.reused_tokens == 0
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "and another"}]
    before = model.receipt()["prompt_tokens"]
    pieces = list(model.chat_stream(messages, second := model.new_completion(), max_new_tokens=5, ignore_eos=True))
    assert "".join(pieces) == second.text
    assert second.reused_tokens >= first.prompt_tokens - 1  # the last token may merge with what follows
    assert model.receipt()["prompt_tokens"] - before == second.prompt_tokens


def test_a_conversation_that_is_too_long_loses_its_oldest_messages(model: tightfit.Model) -> None:
    messages = [{"role": "system", "content": "Be brief."}]
    for number in range(40):
        messages.append({"role": "user", "content": f"what is the {number}th number?"})
        messages.append({"role": "assistant", "content": "I do not know."})
    messages.append({"role": "user", "content": "and the last one?"})
    before = [dict(message) for message in messages]
    answer = model.chat(messages, max_new_tokens=5, ignore_eos=True)
    assert answer.dropped_messages > 0
    assert answer.dropped_messages % 2 == 0  # questions go with their answers
    # As long as possible: one pair more would not have fitted beside an answer.
    assert model.plan.context - 60 < answer.prompt_tokens + 5 <= model.plan.context
    assert messages == before


@pytest.mark.parametrize("messages", ["hello", [], ["hello"]])
def test_a_conversation_that_is_no_list_of_messages_is_refused(
    model: tightfit.Model, messages: list[dict[str, str]]
) -> None:
    with pytest.raises(tightfit.UsageError, match="a conversation is a list of messages"):
        model.chat(messages)


def test_a_second_text_while_one_is_streamed_is_refused(model: tightfit.Model) -> None:
    stream = model.stream(PROMPT, max_new_tokens=20)
    next(stream)
    for other in (lambda: model.generate(PROMPT), lambda: model.score([0, 1]), lambda: next(model.stream(PROMPT))):
        with pytest.raises(tightfit.UsageError, match="still generating"):
            other()
    stream.close()
    assert model.generate(PROMPT, max_new_tokens=2).finish == "length"


def test_prompts_can_be_token_ids(model: tightfit.Model) -> None:
    prompts = [PROMPT, "import os"]
    ids = [model.tokenizer.encode(prompt) for prompt in prompts]
    assert model.generate_tokens(ids, max_new_tokens=4) == model.generate(prompts, max_new_tokens=4)
    with pytest.raises(tightfit.UsageError, match="is empty"):
        model.generate_tokens([[]])
    with pytest.raises(tightfit.CheckpointError, match="vocabulary"):
        model.generate_tokens([[1 << 20]])


def test_an_unknown_option_is_refused_with_the_known_ones(model: tightfit.Model) -> None:
    with pytest.raises(tightfit.UsageError, match=r"unknown option 'tempereture'\nKnown: .*temperature"):
        model.generate(PROMPT, tempereture=1)


def test_tokens_outside_of_the_vocabulary_are_not_scored(model: tightfit.Model) -> None:
    for tokens in ([0, tiny_llama.VOCAB], [-1, 0]):
        with pytest.raises(tightfit.CheckpointError, match="vocabulary of tiny ends at 6143"):
            model.score(tokens)


def test_a_text_longer_than_the_context_is_not_scored(model: tightfit.Model) -> None:
    assert len(model.score([5] * model.plan.context)) == model.plan.context - 1
    with pytest.raises(tightfit.UsageError, match="the context of 256"):
        model.score([5] * (model.plan.context + 1))


def test_a_plan_can_be_given_and_then_nothing_that_it_fixes(model: tightfit.Model, folder: Path) -> None:
    with tightfit.load(str(folder), plan=model.plan) as again:
        assert again.generate(PROMPT, max_new_tokens=5) == model.generate(PROMPT, max_new_tokens=5)
        assert again.plan.sequences == 2
    with pytest.raises(tightfit.UsageError, match="both the plan and context = 64"):
        tightfit.load(str(folder), plan=model.plan, context=64)


def test_progress_counts_bytes_up_to_all_of_them(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    tightfit.load(str(folder), memory="2GiB", progress=lambda done, total: seen.append((done, total))).close()
    done = [each for each, _ in seen]
    assert done == sorted(done)
    assert 0.99 < done[-1] / seen[-1][1] <= 1  # arenas are rounded up to pages


def test_a_load_that_fails_leaves_no_file_open(folder: Path, tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/dev/fd"))

    broken = tiny_llama.write(tmp_path / "broken", intermediate_size=64)
    unknown = tiny_llama.write(tmp_path / "unknown", model_type="mamba")
    before = descriptors()
    for wish in (
        {"model": broken},
        {"model": unknown},
        {"model": folder, "memory": "5MiB"},
        {"model": folder, "context": 9999},
    ):
        with pytest.raises(tightfit.TightfitError):
            tightfit.load(str(wish.pop("model")), **wish)
    assert descriptors() == before


def test_the_receipt_is_json(model: tightfit.Model) -> None:
    assert json.loads(json.dumps(model.receipt()))["plan"] == json.loads(model.plan.model_dump_json())
