"""Sampling follows the distributions that transformers defines, repeatably, and refuses what is not a number."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tightfit.decode.sample import LIKELY, Sampler, SamplingParams
from tightfit.errors import TightfitError, UsageError

HISTORY = [3, 1, 4, 1, 5, 9, 2, 6]


def logits_of(vocab: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


def expected_distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The probabilities (vocab,) after transformers' processors in transformers' order."""
    processors = [
        RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
        TemperatureLogitsWarper(params.temperature),
        *([TopKLogitsWarper(params.top_k)] if params.top_k else []),
        TopPLogitsWarper(params.top_p),
        MinPLogitsWarper(params.min_p),
    ]
    scores = logits[None].clone()
    for processor in processors:
        scores = processor(torch.tensor([HISTORY]), scores)
    return scores[0].double().softmax(0)


def drawn_distribution(logits: torch.Tensor, params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The probabilities (vocab,) with which a Sampler gives each token: the lengths of the random numbers' intervals.

    A token is a step function of the one random number; its steps are found by halving.
    """
    sampler = Sampler(params)

    def token_at(number: float) -> int:
        monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: torch.tensor(number, dtype=torch.float64))
        return sampler.sample(logits.clone(), HISTORY)

    result = torch.zeros(logits.numel(), dtype=torch.float64)
    start = 0.0
    while start < 1:
        token = token_at(start)
        inside, outside = start, 1.0
        for _ in range(40):  # halvings: 2^-40 is far below the tolerance
            middle = (inside + outside) / 2
            if token_at(middle) == token:
                inside = middle
            else:
                outside = middle
        result[token] += outside - start
        start = outside if outside < 1 else 1.0
    monkeypatch.undo()
    return result


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.8},
        {"top_p": 0.01},
        {"top_p": 0.0},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.7},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(settings: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(**{"temperature": 1.0} | settings)
    logits = logits_of(40)
    expected = expected_distribution(logits, params)
    drawn = drawn_distribution(logits, params, monkeypatch)
    assert torch.equal(drawn > 0, expected > 0)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-6)  # float32 exponentials


@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_top_p_keeps_the_same_tokens_when_it_must_look_at_more_than_the_likely_ones(spread: float) -> None:
    logits = logits_of(20 * LIKELY, spread=spread)
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=1)
    allowed = expected_distribution(logits, params) > 0
    tokens, _ = Sampler(params)._most_likely(logits - logits.max())[1].sort()
    # One token at the edge may fall on either side by rounding in a sum of 20,000 float32 numbers in transformers.
    difference = set(tokens.tolist()) ^ set(allowed.nonzero()[:, 0].tolist())
    assert len(difference) <= 0.0005 * int(allowed.sum()) + 1


@pytest.mark.parametrize("settings", [{"top_k": 50}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.9}], ids=str)
def test_a_large_vocabulary_is_not_sorted(settings: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_sizes: list[int] = []
    topk, sort = torch.Tensor.topk, torch.Tensor.sort

    def spy_topk(scores: torch.Tensor, k: int) -> object:
        sorted_sizes.append(k)
        return topk(scores, k)

    def spy_sort(scores: torch.Tensor, **order: bool) -> object:
        sorted_sizes.append(scores.numel())
        return sort(scores, **order)

    monkeypatch.setattr(torch.Tensor, "topk", spy_topk)
    monkeypatch.setattr(torch.Tensor, "sort", spy_sort)
    # As peaked as those of a language model: a few hundred tokens hold nine tenths of the probability.
    Sampler(SamplingParams(temperature=1.0, seed=0, **settings)).sample(logits_of(256_000, spread=8.0), [])
    assert sorted_sizes
    assert max(sorted_sizes) <= LIKELY


def test_greedy_takes_the_largest_logit_and_the_lowest_of_equals() -> None:
    logits = torch.zeros(300_000)
    logits[[70_000, 250_000]] = 5.0
    assert Sampler(SamplingParams()).sample(logits, []) == 70_000


def test_a_penalty_also_counts_when_decoding_greedily() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0))
    history = [1]
    logits = torch.tensor([1.0, 1.9, 1.5])
    history.append(sampler.sample(logits.clone(), history))
    assert history[-1] == 2
    assert sampler.sample(logits.clone(), history) == 0  # 2 has been chosen, and counts from now on


def test_tokens_beyond_the_logits_are_not_penalised() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0))  # an embedding may have more rows than the head
    assert sampler.sample(torch.tensor([1.0, 1.9]), [7, 1]) == 0


def draw(seed: int | None, count: int = 50, **settings: float) -> list[int]:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed, **settings))
    return [sampler.sample(logits_of(500, step), []) for step in range(count)]


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others() -> None:
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)  # 50 tokens of 500: equal by chance less than once in 10^50


def test_other_sequences_do_not_change_what_a_sequence_draws() -> None:
    alone = draw(7)
    first, second = (Sampler(SamplingParams(temperature=1.0, seed=seed)) for seed in (7, 8))
    together = []
    for step in range(50):
        second.sample(logits_of(500, step), [])
        torch.rand(3)
        together.append(first.sample(logits_of(500, step), []))
    assert together == alone


def test_the_threads_of_torch_do_not_change_what_is_drawn() -> None:
    threads = torch.get_num_threads()
    drawn = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            sampler = Sampler(SamplingParams(temperature=1.0, top_p=0.95, repetition_penalty=1.1, seed=3))
            drawn.append([sampler.sample(logits_of(100_000, step, 4.0), HISTORY) for step in range(10)])
    finally:
        torch.set_num_threads(threads)
    assert drawn[0] == drawn[1]


def test_masked_tokens_are_never_drawn() -> None:
    for number in (0.0, 0.3, 1 - 2**-53):  # both ends of what a generator gives
        logits = torch.full((10,), -math.inf)
        logits[[2, 6]] = 1.0
        sampler = Sampler(SamplingParams(temperature=1.0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "rand", lambda *a, _number=number, **k: torch.tensor(_number, dtype=torch.float64))
            assert sampler.sample(logits, []) in (2, 6)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_refused(bad: float, temperature: float) -> None:
    logits = logits_of(100)
    logits[40] = bad
    with pytest.raises(TightfitError, match="not numbers"):
        Sampler(SamplingParams(temperature=temperature)).sample(logits, [])


def test_the_coldest_temperature_draws_the_largest_logit() -> None:
    logits = logits_of(100) * 100
    assert Sampler(SamplingParams(temperature=1e-6)).sample(logits.clone(), []) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_the_logprob_is_that_of_the_model_before_penalty_and_cuts(temperature: float) -> None:
    logits = logits_of(100)
    sampler = Sampler(SamplingParams(temperature=temperature, top_k=5, repetition_penalty=1.5, seed=0), logprobs=True)
    token = sampler.sample(logits.clone(), HISTORY)
    assert sampler.logprob == pytest.approx(float(logits.log_softmax(0)[token]), abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1e-9},
        {"top_k": -1},
        {"top_k": 0.5},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"min_p": math.nan},
        {"min_p": 2},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 1 << 64},
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused_by_name(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError) as refused:
        SamplingParams(**settings)
    assert next(iter(settings)) in refused.value.message
    assert refused.value.hint
