"""How good a model is: its loss on text that it has not seen, and whether it can look up what it has just read.

Any engine can be measured: it is given as a callable that maps token ids to the logits after each of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from tightfit.errors import UsageError
from tightfit.zoo.presets import BOS, EOS
from tightfit.zoo.tasks import TASKS, Material

Logits = Callable[[list[int]], Tensor]  # token ids -> (tokens, vocabulary)


@dataclass(frozen=True)
class Loss:
    nats_per_token: float
    bits_per_byte: float  # comparable between tokenizers
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Accuracy:
    """``correct`` of ``asked`` answers had every token right, in texts of ``tokens`` tokens on average."""

    task: str
    tokens: float
    correct: int
    asked: int


def windows(texts: Iterable[str], tokenizer: Tokenizer, tokens: int) -> Iterator[list[int]]:
    """Each text between a begin and an end token, cut into rows of at most ``tokens`` token ids. A row starts with the
    last token of the one before it, so that every token but the first of a text is predicted once."""
    for text in texts:
        ids = [BOS, *tokenizer.encode(text, add_special_tokens=False).ids, EOS]
        for start in range(0, len(ids) - 1, tokens - 1):
            yield ids[start : start + tokens]


def validation_loss(logits: Logits, tokenizer: Tokenizer, rows: Iterable[Sequence[int]]) -> Loss:
    """The mean cross-entropy of every token of ``rows`` but their first. ``tokenizer`` must be byte-level: it says how
    many bytes of text each token stands for, and special tokens stand for none."""
    special = tokenizer.get_added_tokens_decoder()
    # A byte-level vocabulary writes each byte as one character.
    size = {token: len(text) for text, token in tokenizer.get_vocab().items() if token not in special}
    nats, tokens, text_bytes = 0.0, 0, 0
    for row in rows:
        targets = list(row[1:])
        scores = logits(list(row[:-1])).float()
        nats += functional.cross_entropy(scores, torch.tensor(targets, device=scores.device), reduction="sum").item()
        tokens += len(targets)
        text_bytes += sum(size.get(token, 0) for token in targets)
    if not text_bytes:
        raise UsageError("there is no text to measure the loss on", "Give at least one file that is not empty.")
    return Loss(nats / tokens, nats / math.log(2) / text_bytes, tokens, text_bytes)


def lookup_accuracy(
    logits: Logits, material: Material, task: str, tokens: int, questions: int = 12, seed: int = 0
) -> Accuracy:
    """Asks one question about each of ``questions`` texts of about ``tokens`` tokens.

    An answer counts if greedy decoding would write it exactly, its end of line included. The texts depend on ``seed``,
    ``task`` and ``tokens`` alone, so that models can be compared on the same ones. Raises UsageError for an unknown
    task.
    """
    if task not in TASKS:
        raise UsageError(f"there is no task named {task!r}", f"Tasks: {', '.join(TASKS)}.")
    rng = random.Random(f"{seed}/{task}/{tokens}")
    read, correct = 0, 0
    for _ in range(questions):
        example = TASKS[task](rng, material, tokens)
        question = next(example.questions)
        prompt = [BOS, *material.encode(example.context + question.prompt)]
        answer = material.encode(question.answer)
        # The most likely token at every place of the right answer: all match exactly if greedy decoding writes it.
        greedy = logits(prompt + answer[:-1])[len(prompt) - 1 :].argmax(-1).tolist()
        correct += greedy == answer
        read += len(prompt)
    return Accuracy(task, read / questions, correct, questions)
