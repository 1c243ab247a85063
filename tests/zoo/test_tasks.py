from __future__ import annotations

import ast
import itertools
import random
import re

import numpy as np
import pytest
from tokenizers import Tokenizer

from tightfit.errors import UsageError
from tightfit.zoo import corpus, tasks
from tightfit.zoo.presets import BOS
from tightfit.zoo.tasks import Example, Material, Question


def make(task: str, material: Material, tokens: int = 400, seed: int = 0) -> tuple[Example, list[Question]]:
    example = tasks.TASKS[task](random.Random(seed), material, tokens)
    return example, list(itertools.islice(example.questions, 20))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_same_seed_gives_the_same_text_and_questions(material: Material, task: str) -> None:
    (one, asked), (same, asked_again) = make(task, material, seed=3), make(task, material, seed=3)
    assert (one.context, asked) == (same.context, asked_again)
    assert one.context != make(task, material, seed=4)[0].context


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("tokens", [200, 800])
def test_a_text_is_about_as_long_as_was_asked_for(material: Material, task: str, tokens: int) -> None:
    lengths = [len(material.encode(make(task, material, tokens, seed)[0].context)) for seed in range(5)]
    # Code is cut back to whole lines, which are up to 400 characters long, about 120 tokens.
    assert all(tokens - 120 < length < 1.1 * tokens for length in lengths), lengths


@pytest.mark.parametrize("seed", range(5))
def test_a_dictionary_holds_what_its_assertions_say(material: Material, seed: int) -> None:
    example, questions = make("dictionary", material, seed=seed)
    registry = ast.literal_eval(example.context.removeprefix("registry = "))
    assert len(registry) > 20  # 400 tokens at 12 to 15 an entry
    for question in questions:
        match = re.fullmatch(r'assert registry\["(\w+)"\] == (\d{5})\n', question.prompt + question.answer)
        assert match
        assert registry[match[1]] == int(match[2])


@pytest.mark.parametrize("seed", range(5))
def test_needles_stand_in_real_code_and_answer_their_questions(material: Material, seed: int) -> None:
    example, questions = make("needles", material, seed=seed)
    hidden = dict(re.findall(r"^# The secret number for (\w+) is (\d{5})\.$", example.context, re.MULTILINE))
    assert 1 <= len(hidden) <= 6
    for question in questions:
        match = re.fullmatch(r"# Question: .* number for (\w+)\? Answer: (\d{5})\n", question.prompt + question.answer)
        assert match
        assert hidden[match[1]] == match[2]
    code = re.sub(r"^# The secret number .*\n", "", example.context, flags=re.MULTILINE)
    assert len(material.encode(code)) > 0.4 * 400
    assert code in material.tokenizer.decode(material.code.tolist())


@pytest.mark.parametrize("seed", range(5))
def test_a_copy_goes_on_as_the_text_did(material: Material, seed: int) -> None:
    example, questions = make("copy", material, seed=seed)
    for question in questions:
        again = question.prompt.removeprefix("# again\n")
        assert again
        assert question.answer.strip()
        assert example.context.startswith(again + question.answer)


@pytest.mark.parametrize("seed", range(5))
def test_a_chain_runs_as_python_and_its_assertions_hold(material: Material, seed: int) -> None:
    example, questions = make("chain", material, seed=seed)
    names: dict[str, int] = {}
    exec(example.context, names)
    for question in questions:
        exec(question.prompt + question.answer, names)
        assert re.fullmatch(r"\d{3}\n", question.answer)
    # Six of ten lines name an earlier name: a text without them would test a dictionary a second time.
    assert re.search(r"^\w+ = [a-z]+$", example.context, re.MULTILINE)


def test_every_answer_ends_its_line(material: Material) -> None:
    for task in tasks.TASKS:
        for question in make(task, material)[1]:
            assert question.answer.endswith("\n")
            assert question.answer.count("\n") == 1


def test_a_training_row_is_exactly_as_long_as_asked_and_its_answers_are_right(material: Material) -> None:
    found = 0
    for seed in range(20):
        ids = tasks.row(random.Random(seed), material, 513)
        assert len(ids) == 513
        assert ids[0] == BOS
        text = material.tokenizer.decode(ids)
        entries = dict(re.findall(r'^    "(\w+)": (\d+),$', text, re.MULTILINE))
        for key, value in re.findall(r'^assert registry\["(\w+)"\] == (\d+)\n', text, re.MULTILINE):
            assert entries[key] == value
            found += 1
    # Nine of twenty rows are dictionaries, with at least a dozen questions each.
    assert found > 50


def test_every_task_is_drawn_in_training(material: Material) -> None:
    assert set(tasks.MIX) == set(tasks.TASKS)
    marks = {
        "dictionary": "assert registry[",
        "needles": "# Question: what",
        "copy": "# again\n",
        "chain": "assert ",
    }
    texts = [material.tokenizer.decode(tasks.row(random.Random(seed), material, 257)) for seed in range(60)]
    seen = {next(task for task, mark in marks.items() if mark in text) for text in texts}
    assert seen == set(tasks.TASKS)  # the rarest is a tenth: 60 rows miss it once in 500 seeds, and these do not


def test_a_tokenizer_that_knows_too_few_words_is_refused() -> None:
    small = corpus.train_tokenizer(["short words only here"], vocab_size=262)
    with pytest.raises(UsageError, match="words of 4 to 9 letters"):
        Material(small, np.zeros(10, dtype=np.uint16))


def test_code_without_whole_lines_is_refused(tokenizer: Tokenizer) -> None:
    material = Material.of_text(tokenizer, "one line only " * 50)
    with pytest.raises(UsageError, match="two whole lines"):
        material.lines(random.Random(0), 100)
