"""`tightfit run --chat`: turns from a pipe, only what is new is computed, and a full context drops the oldest."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from tests import tiny_llama
from tests.cli.command import CHECKPOINT, USAGE, check, tightfit

import tightfit as package
from tightfit.checkpoints.tokenizer import Tokenizer
from tightfit.engine.generate import Completion

SYSTEM = "Be brief."
TURNS = ["write a loop", "now backwards", "and once more"]
OPTIONS = ("-n", 6, "--ignore-eos")


@pytest.fixture
def completions(monkeypatch: pytest.MonkeyPatch) -> list[Completion]:
    """The answers of the conversation, as the engine saw them."""
    made: list[Completion] = []

    def new_completion() -> Completion:
        made.append(Completion())
        return made[-1]

    monkeypatch.setattr(package.Model, "new_completion", staticmethod(new_completion))
    return made


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rendered conversations that were sent to the model."""
    seen: list[str] = []
    encode = Tokenizer.encode

    def spy(self: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
        if text.endswith("assistant\n"):
            seen.append(text)
        return encode(self, text, add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", spy)
    return seen


def test_each_line_is_a_turn_and_each_answer_follows(talkative: Path, completions: list[Completion]) -> None:
    done = tightfit("run", talkative, "--chat", *OPTIONS, stdin="\n".join(TURNS))  # the last line has no end
    assert done.status == 0
    assert len(completions) == len(TURNS)
    assert done.stdout == "".join(completion.text + "\n" for completion in completions)
    assert "Receipt" in done.stderr


def test_empty_lines_are_no_turns(talkative: Path, completions: list[Completion]) -> None:
    assert tightfit("run", talkative, "--chat", *OPTIONS, stdin="\n\nhello\n  \n").status == 0
    assert len(completions) == 1


def test_a_turn_sees_the_turns_before_it(talkative: Path, completions: list[Completion], prompts: list[str]) -> None:
    tightfit("run", talkative, "--chat", "--system", SYSTEM, *OPTIONS, stdin="\n".join(TURNS[:2]))
    expected = (
        f"<|bos|>system\n{SYSTEM}<|eos|>\n<|bos|>user\n{TURNS[0]}<|eos|>\n"
        f"<|bos|>assistant\n{completions[0].text}<|eos|>\n<|bos|>user\n{TURNS[1]}<|eos|>\n<|bos|>assistant\n"
    )
    assert prompts[-1] == expected


def test_only_new_tokens_are_computed_and_the_answers_are_the_same(
    talkative: Path, completions: list[Completion]
) -> None:
    tightfit("run", talkative, "--chat", *OPTIONS, stdin="\n".join(TURNS))
    answers = list(completions)
    assert answers[0].reused_tokens == 0
    for before, after in itertools.pairwise(answers):
        # The last token of the prompt before may be another one now that something follows.
        assert before.prompt_tokens - 1 <= after.reused_tokens < after.prompt_tokens
    messages: list[dict[str, str]] = []
    for turn, answer in zip(TURNS, answers, strict=True):
        messages.append({"role": "user", "content": turn})
        with package.load(str(talkative), memory="2GiB") as fresh:
            alone = fresh.chat(messages, max_new_tokens=6, ignore_eos=True)
        assert (alone.text, alone.reused_tokens) == (answer.text, 0)
        messages.append({"role": "assistant", "content": answer.text})


def test_a_full_context_drops_the_oldest_messages_and_says_so(
    talkative: Path, completions: list[Completion], prompts: list[str]
) -> None:
    turns = [f"turn {number} says that the sum of {number} and {number} is to be computed" for number in range(6)]
    options = ("--context", 96, "--system", SYSTEM, *OPTIONS)
    done = tightfit("run", talkative, "--chat", *options, stdin="\n".join(turns))
    assert done.status == 0
    assert all(completion.finish == "length" and len(completion.tokens) == 6 for completion in completions)
    dropped = sum(completion.dropped_messages for completion in completions)
    assert dropped > 0
    said = [line for line in done.stderr.splitlines() if "the context is full" in line]
    assert len(said) == sum(1 for completion in completions if completion.dropped_messages)
    last = prompts[-1]
    assert last.startswith(f"<|bos|>system\n{SYSTEM}")  # it stays
    assert turns[0] not in last
    assert turns[-1] in last


def test_a_message_that_does_not_fit_alone_ends_the_conversation(talkative: Path) -> None:
    done = tightfit("run", talkative, "--chat", "--context", 32, *OPTIONS, stdin="word " * 60)
    assert done.status == USAGE
    assert "the conversation" in done.stderr
    assert "up to 256: --context" in done.stderr


def test_a_line_that_is_not_text_ends_the_conversation(talkative: Path) -> None:
    check(tightfit("run", talkative, "--chat", stdin=b"caf\xe9\n"), USAGE, "the line is not UTF-8 text", "iconv")


def folder_with(template: str, folder: Path) -> Path:
    tiny_llama.write(folder)
    file = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"chat_template": template}))
    return folder


@pytest.mark.usefixtures("unloaded")
def test_a_faulty_template_is_found_before_loading(tmp_path: Path) -> None:
    broken = folder_with("{% for %}", tmp_path / "broken")
    check(tightfit("run", broken, "--chat", stdin="hello"), CHECKPOINT, "the chat template of broken cannot be read")


@pytest.mark.usefixtures("unloaded")
def test_a_system_message_that_the_template_refuses_is_found_before_loading(tmp_path: Path) -> None:
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    strict = folder_with(refusal, tmp_path / "strict")
    done = tightfit("run", strict, "--chat", "--system", SYSTEM, stdin="hello")
    check(done, USAGE, "refuses these messages: no system role")
