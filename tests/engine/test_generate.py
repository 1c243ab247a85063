"""Generation on the embedded model: the same text alone and in company, stops, limits, conversations, and scores."""

from __future__ import annotations

import math

import pytest

import tightfit
from tightfit.decode.sample import SamplingParams
from tightfit.engine.generate import Completion, Request

PROMPTS = [
    "def fibonacci(n):\n    if n < 2:\n",
    "import os\nimport sys\n\nclass Reader:\n    def __init__(self, path):\n" * 6,  # longer than one chunk
    "# The",
    "registry = {\n    'alpha': 12345,\n    'beta': 54321,\n}\nassert registry['alpha'] ==",
    "for",
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_seed_gives_the_same_text_alone_and_in_a_batch(model: tightfit.Model, temperature: float) -> None:
    options = {"max_new_tokens": 24, "temperature": temperature, "seed": 7}
    alone = [model.generate(prompt, **options).tokens for prompt in PROMPTS]
    together = [completion.tokens for completion in model.generate(PROMPTS, **options)]  # five prompts, three places
    assert together == alone
    assert all(alone)


def test_another_seed_gives_another_text(model: tightfit.Model) -> None:
    texts = {model.generate(PROMPTS[0], max_new_tokens=24, temperature=1.0, seed=seed).text for seed in range(3)}
    assert len(texts) > 1


def test_streamed_pieces_add_up_to_the_text(model: tightfit.Model) -> None:
    pieces = list(model.stream(PROMPTS[0], max_new_tokens=24))
    assert len(pieces) > 1
    assert "".join(pieces) == model.generate(PROMPTS[0], max_new_tokens=24).text


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(model: tightfit.Model) -> None:
    whole = model.generate(PROMPTS[1], max_new_tokens=40)
    stop = whole.text[10:14]
    cut = model.generate(PROMPTS[1], max_new_tokens=40, stop=stop)
    assert cut.finish == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert len(cut.tokens) < len(whole.tokens)


def test_a_stop_token_ends_the_text(model: tightfit.Model) -> None:
    whole = model.generate(PROMPTS[0], max_new_tokens=12)
    token = whole.tokens[5]
    completion = Completion()
    request = Request(model.tokenizer.encode(PROMPTS[0]), 12, SamplingParams(), stop_tokens=frozenset({token}))
    list(model._generator.run([request], [completion]))
    assert completion.finish == "stop"
    assert completion.tokens == whole.tokens[: whole.tokens.index(token) + 1]


def test_a_full_context_ends_the_text(model: tightfit.Model) -> None:
    tokens = model.tokenizer.encode("x = 1\n" * 400)[:500]
    completion = Completion()
    list(model._generator.run([Request(tokens, 100, SamplingParams())], [completion]))
    assert completion.finish == "length"
    assert len(tokens) + len(completion.tokens) == model.plan.context


def test_a_prompt_longer_than_the_context_is_refused(model: tightfit.Model) -> None:
    with pytest.raises(tightfit.UsageError, match="more tokens than the context of 512 holds"):
        model.generate("x = 1\n" * 400)


def test_an_empty_prompt_is_refused(model: tightfit.Model) -> None:
    with pytest.raises(tightfit.UsageError, match="empty"):
        model.generate("")


def test_the_next_turn_computes_only_what_is_new_and_says_the_same(model: tightfit.Model) -> None:
    generator = model._generator
    first_tokens = model.tokenizer.encode(PROMPTS[1])
    first = Completion()
    list(generator.run([Request(first_tokens, 10, SamplingParams())], [first], conversation=True))
    more = model.tokenizer.encode("\n        return path\n")
    second_tokens = first_tokens + first.tokens + more
    before = generator.timing.prefill_tokens
    second = Completion()
    list(generator.run([Request(second_tokens, 10, SamplingParams())], [second], conversation=True))
    # The last generated token was never computed, so it is new too.
    assert generator.timing.prefill_tokens - before == len(more) + 1
    assert second.reused_tokens == len(second_tokens) - len(more) - 1
    fresh = Completion()
    list(generator.run([Request(second_tokens, 10, SamplingParams())], [fresh]))
    assert fresh.reused_tokens == 0
    assert second.tokens == fresh.tokens


def test_a_conversation_that_goes_back_reuses_what_still_holds(model: tightfit.Model) -> None:
    generator = model._generator
    tokens = model.tokenizer.encode(PROMPTS[1])
    list(generator.run([Request(tokens, 4, SamplingParams())], [Completion()], conversation=True))
    changed = tokens[:20] + model.tokenizer.encode("import json\n")
    reused, fresh = Completion(), Completion()
    list(generator.run([Request(changed, 10, SamplingParams())], [reused], conversation=True))
    list(generator.run([Request(changed, 10, SamplingParams())], [fresh]))
    assert reused.reused_tokens >= 20
    assert reused.tokens == fresh.tokens


def test_closing_a_stream_gives_its_place_back(model: tightfit.Model) -> None:
    for _ in range(5):  # more often than there are places
        stream = model.stream(PROMPTS[0], max_new_tokens=50)
        next(stream)
        stream.close()
    assert model.generate(PROMPTS[0], max_new_tokens=4).finish == "length"


def test_scores_are_the_log_probabilities_of_the_tokens(model: tightfit.Model) -> None:
    tokens = model.tokenizer.encode(PROMPTS[1])
    scores = model.score(tokens)
    assert len(scores) == len(tokens) - 1
    # Greedy decoding takes the most likely token: nothing else can score higher.
    greedy = model.generate(PROMPTS[1], max_new_tokens=1).tokens[0]
    best = model.score([*tokens, greedy])[-1]
    others = [model.score([*tokens, token])[-1] for token in (5, 100, 1000)]
    assert best > max(others)
    total = sum(math.exp(score) for score in (best, *others))
    assert total <= 1.0 + 1e-3


def test_the_receipt_has_its_stable_keys_and_stays_inside_the_budget(model: tightfit.Model) -> None:
    model.generate(PROMPTS[0], max_new_tokens=4)
    receipt = model.receipt()
    for key in ("budget_bytes", "peak_rss_bytes", "accounts", "prompt_tokens", "new_tokens", "time_to_first_token_s"):
        assert key in receipt
    assert receipt["prefill_tokens_per_s"] > 0
    assert receipt["decode_tokens_per_s"] > 0
    assert receipt["plan"]["version"] == 1
    assert receipt["accounts"]["weights"]["peak_bytes"] > 13 << 20  # the embedded model is 13.5 MiB in bfloat16
