from __future__ import annotations

import itertools
import math

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tightfit.errors import UsageError
from tightfit.zoo import evaluate, tasks
from tightfit.zoo.presets import BOS, EOS
from tightfit.zoo.tasks import Material

TEXT = "def área(r):\n    return 3.14 * r ** 2  # µm²\n" * 10


def test_a_model_that_knows_nothing_has_the_loss_of_a_uniform_guess(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab_size()
    rows = list(evaluate.windows([TEXT], tokenizer, 50))
    loss = evaluate.validation_loss(lambda ids: torch.zeros(len(ids), vocabulary), tokenizer, rows)
    assert loss.nats_per_token == pytest.approx(math.log(vocabulary))
    assert loss.bytes == len(TEXT.encode())
    assert loss.bits_per_byte == pytest.approx(math.log2(vocabulary) * loss.tokens / len(TEXT.encode()))


def test_the_loss_is_that_of_each_next_token(tokenizer: Tokenizer) -> None:
    row = [BOS, *tokenizer.encode(TEXT, add_special_tokens=False).ids]

    def knows_the_text(ids: list[int]) -> Tensor:
        scores = torch.zeros(len(ids), tokenizer.get_vocab_size())
        scores[range(len(ids)), row[1 : len(ids) + 1]] = 100.0
        return scores

    assert evaluate.validation_loss(knows_the_text, tokenizer, [row]).nats_per_token == pytest.approx(0, abs=1e-6)


def test_windows_predict_every_token_of_a_text_once(tokenizer: Tokenizer) -> None:
    rows = list(evaluate.windows([TEXT], tokenizer, 50))
    whole = [BOS, *tokenizer.encode(TEXT, add_special_tokens=False).ids, EOS]
    assert len(rows) > 2
    assert max(map(len, rows)) == 50
    assert [token for row in rows for token in row[1:]] == whole[1:]
    assert all(before[-1] == after[0] for before, after in itertools.pairwise(rows))


def test_no_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="no text"):
        evaluate.validation_loss(lambda ids: torch.zeros(len(ids), 8), tokenizer, [])


class Reader:
    """Writes the token that the prompt goes on with, and at the end a line end; ``wrong`` counts from the end."""

    def __init__(self, tokenizer: Tokenizer, wrong: int | None = None) -> None:
        self.vocabulary = tokenizer.get_vocab_size()
        (self.line_end,) = tokenizer.encode("\n", add_special_tokens=False).ids
        self.wrong = wrong
        self.read: list[list[int]] = []

    def __call__(self, ids: list[int]) -> Tensor:
        self.read.append(ids)
        following = [*ids[1:], self.line_end]
        if self.wrong is not None:
            following[-self.wrong] = 0
        return torch.nn.functional.one_hot(torch.tensor(following), self.vocabulary).float()


@pytest.mark.parametrize("task", ["dictionary", "needles", "chain"])
def test_an_answer_counts_only_if_every_token_of_it_is_right(
    tokenizer: Tokenizer, material: Material, task: str
) -> None:
    digits = 3 if task == "chain" else 5

    def correct(wrong: int | None) -> int:
        return evaluate.lookup_accuracy(Reader(tokenizer, wrong), material, task, 200, questions=4).correct

    assert correct(None) == 4
    assert correct(1) == 0  # the line end
    assert correct(1 + digits) == 0  # the first digit
    assert correct(2 + digits) == 4  # the last token of the prompt, which is not the model's to write


def test_models_are_asked_the_same_questions(tokenizer: Tokenizer, material: Material) -> None:
    one, other = Reader(tokenizer), Reader(tokenizer)
    accuracy = evaluate.lookup_accuracy(one, material, "dictionary", 200, questions=3)
    evaluate.lookup_accuracy(other, material, "dictionary", 200, questions=3)
    assert one.read == other.read
    assert len({tuple(ids) for ids in one.read}) == 3
    assert one.read[0][0] == BOS
    # The callable also reads the answer but its last token: five digits here.
    assert accuracy.tokens == sum(len(ids) - 5 for ids in one.read) / 3
    assert accuracy.asked == 3


def test_an_unknown_task_is_refused_with_the_known_ones(tokenizer: Tokenizer, material: Material) -> None:
    with pytest.raises(UsageError, match=", ".join(tasks.TASKS)):
        evaluate.lookup_accuracy(Reader(tokenizer), material, "riddles", 200)
