"""Tasks that need looking up what was read: their texts, questions and answers, the same for training and evaluation.

A task is a function of a random generator, the material to make text from, and the number of tokens that the text
should have. The same state of the generator gives the same example. Texts are plain strings: any model can read them.
"""

from __future__ import annotations

import keyword
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tightfit.errors import UsageError
from tightfit.zoo.presets import BOS

WORD = re.compile("[a-z]{4,9}")
FEWEST_WORDS = 16
NEEDLE = "# The secret number for {} is {}.\n"
ASKED_NEEDLE = "# Question: what is the secret number for {}? Answer: "
ATTEMPTS = 1000  # a place in the code with two whole lines is found at once unless there is none


@dataclass(frozen=True)
class Question:
    """``answer`` continues ``context + prompt`` and ends its line."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Example:
    """A text, and an endless run of questions that it answers. Each question stands alone, right after the text."""

    context: str
    questions: Iterator[Question]


@dataclass(frozen=True)
class Material:
    """What examples are made of: real code as token ids, and words that the tokenizer knows as one token."""

    tokenizer: Tokenizer
    code: np.ndarray[tuple[int], np.dtype[np.integer[Any]]]
    words: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # A byte-level vocabulary writes a space as Ġ, SentencePiece as ▁.
        known = (token[1:] for token in self.tokenizer.get_vocab() if token.startswith(("Ġ", "▁")))
        words = tuple(sorted(word for word in known if WORD.fullmatch(word) and not keyword.iskeyword(word)))
        if len(words) < FEWEST_WORDS:
            raise UsageError(
                f"the tokenizer knows {len(words)} words of 4 to 9 letters, and the tasks need {FEWEST_WORDS}",
                "Train it on more text or with a larger --vocab-size.",
            )
        object.__setattr__(self, "words", words)

    @classmethod
    def of_text(cls, tokenizer: Tokenizer, text: str) -> Material:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return cls(tokenizer, np.array(ids, dtype=np.uint16))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def lines(self, rng: random.Random, tokens: int) -> list[str]:
        """Consecutive whole lines of code from a random place, at most ``tokens`` tokens, the second one not blank."""
        for _ in range(ATTEMPTS):
            start = rng.randint(0, max(0, len(self.code) - tokens))
            text = self.tokenizer.decode(self.code[start : start + tokens].tolist())
            lines = [line + "\n" for line in text.split("\n")[1:-1]]  # what is left out was cut anywhere
            if len(lines) > 1 and lines[1].strip():
                return lines
        raise UsageError(
            f"no {tokens} tokens of the {len(self.code)} tokens of code hold two whole lines",
            "Ask for longer contexts, or give more text.",
        )


Task = Callable[[random.Random, Material, int], Example]


def number(rng: random.Random, digits: int = 5) -> str:
    """``digits`` random digits; the first is not zero, so that it is a number in Python too."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _ask(rng: random.Random, values: dict[str, str], prompt: str) -> Iterator[Question]:
    """Questions for random keys of ``values``; ``prompt`` has the key's place as ``{}``."""
    keys = list(values)
    while True:
        key = rng.choice(keys)
        yield Question(prompt.format(key), f"{values[key]}\n")


def dictionary(rng: random.Random, material: Material, tokens: int) -> Example:
    """A Python dictionary of words to five-digit numbers, and assertions on its entries.

    It has no more entries than the tokenizer has words, so very long ones are shorter than asked for.
    """

    def write(values: dict[str, str]) -> str:
        return "registry = {\n" + "".join(f'    "{key}": {value},\n' for key, value in values.items()) + "}\n"

    sample = dict.fromkeys(rng.sample(material.words, FEWEST_WORDS), number(rng))
    per_entry = len(material.encode(write(sample))) / len(sample)
    entries = min(max(2, int(tokens / per_entry)), len(material.words))
    values = {key: number(rng) for key in rng.sample(material.words, entries)}
    return Example(write(values), _ask(rng, values, 'assert registry["{}"] == '))


def needles(rng: random.Random, material: Material, tokens: int) -> Example:
    """One to six five-digit numbers hidden as comments between lines of real code, which fills at least half."""
    values: dict[str, str] = {}
    hidden: list[str] = []
    room = tokens
    for key in rng.sample(material.words, rng.randint(1, 6)):
        value = number(rng)
        needle = NEEDLE.format(key, value)
        room -= len(material.encode(needle))
        if hidden and room < tokens / 2:
            break
        values[key] = value
        hidden.append(needle)
    lines = material.lines(rng, room)
    for needle in hidden:
        lines.insert(rng.randint(0, len(lines)), needle)
    return Example("".join(lines), _ask(rng, values, ASKED_NEEDLE))


def copy(rng: random.Random, material: Material, tokens: int) -> Example:
    """Real code, its first lines again, and the line that comes next."""
    lines = material.lines(rng, tokens)
    places = [place for place in range(1, len(lines)) if lines[place].strip()]

    def ask() -> Iterator[Question]:
        while True:
            place = rng.choice(places)
            yield Question("# again\n" + "".join(lines[:place]), lines[place])

    return Example("".join(lines), ask())


def chain(rng: random.Random, material: Material, tokens: int) -> Example:
    """Assignments of three-digit numbers or of names assigned before, and assertions on what the names hold."""
    values: dict[str, str] = {}
    lines: list[str] = []
    room = tokens
    for name in rng.sample(material.words, len(material.words)):
        source = rng.choice(list(values)) if values and rng.random() < 0.6 else number(rng, 3)
        line = f"{name} = {source}\n"
        room -= len(material.encode(line))
        if values and room < 0:
            break
        values[name] = values.get(source, source)
        lines.append(line)
    return Example("".join(lines), _ask(rng, values, "assert {} == "))


TASKS: dict[str, Task] = {"dictionary": dictionary, "needles": needles, "copy": copy, "chain": chain}


@dataclass(frozen=True)
class Mix:
    """How a task is drawn in training: how often, and which share of the row its text takes. Questions fill the rest,
    so that a row teaches many look-ups."""

    weight: float
    text: tuple[float, float]


MIX = {
    "dictionary": Mix(0.45, (0.15, 0.6)),
    "needles": Mix(0.35, (0.8, 0.9)),
    "copy": Mix(0.1, (0.3, 0.45)),
    "chain": Mix(0.1, (0.15, 0.6)),
}


def row(rng: random.Random, material: Material, tokens: int) -> list[int]:
    """A training row of exactly ``tokens`` token ids: a random task's text, then questions with their answers."""
    name = rng.choices(list(MIX), [mix.weight for mix in MIX.values()])[0]
    example = TASKS[name](rng, material, int(rng.uniform(*MIX[name].text) * tokens))
    ids = [BOS, *material.encode(example.context)]
    while len(ids) < tokens:
        question = next(example.questions)
        ids += material.encode(question.prompt + question.answer)
    return ids[:tokens]
