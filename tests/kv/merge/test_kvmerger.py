"""kvmerger keeps runs of consecutive tokens with similar keys as one token each."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kv.merge.layer import DIM, HEADS, VALUES, Driver, Kept, assert_same, tokens

from tightfit.errors import UsageError
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose

PLAIN = "kvmerger(keep={},recent=0,heavy=0)"


def clusters(sizes: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of runs whose keys point almost the same way, and those of different runs another way each."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.eye(DIM)[torch.arange(len(sizes)) % DIM] * 3
    keys = torch.cat([mean.expand(size, HEADS, DIM) for mean, size in zip(means, sizes, strict=True)])
    values = torch.randn(len(keys), HEADS, VALUES, generator=generator)
    return keys + 0.1 * torch.randn(keys.shape, generator=generator), values


def spans(sizes: list[int]) -> list[range]:
    return [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def merged(keys: torch.Tensor, values: torch.Tensor, pivot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, for one run and head."""
    squares = [float(((key - keys[pivot]) ** 2).sum()) for key in keys]
    others = [math.sqrt(square) for i, square in enumerate(squares) if i != pivot]
    sigma = sum(others) / len(others) / math.sqrt(2) if others else 1.0
    weights = torch.tensor([math.exp(-square / (2 * sigma**2)) for square in squares])
    weights /= weights.sum()
    return weights @ keys, weights @ values


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=12), seed=st.integers(0, 99))
def test_each_run_becomes_one_token_at_the_one_with_most_attention(sizes: list[int], seed: int) -> None:
    """With as many tokens as there are runs, one of each stays, the one with most attention, and it is the mean of
    its run that the Gaussian of the distances weighs."""
    keys, values = clusters(sizes, seed)
    queries = torch.randn(keys.shape, generator=torch.Generator().manual_seed(seed + 1))
    driver = Driver(PLAIN.format(len(sizes)))
    received = attention(queries, keys)
    driver.add(queries, keys, values)
    for head in range(HEADS):
        wanted: Kept = {}
        for span in spans(sizes):
            here = slice(span.start, span.stop)
            pivot = int(received[head, here].argmax())
            wanted[span.start + pivot] = merged(keys[here, head], values[here, head], pivot)
        assert_same(driver.kept(head), wanted)


def attention(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """What each key receives (heads, n) from the queries behind it."""
    scores = torch.einsum("qhd,khd->hqk", queries, keys)
    hidden = torch.ones(len(keys), len(keys)).triu(1).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).sum(1)


def test_other_mergers_take_tokens_from_anywhere() -> None:
    """Two runs with the same keys, far apart: d2o merges across, kvmerger does not."""
    found = {}
    for kv in ("d2o(keep=4,recent=0)", PLAIN.format(4)):
        keys, values = clusters([8, 4, 8, 4])
        keys[12:20] = keys[:8]  # the third run is the first again
        values[:8], values[8:] = 1.0, 0.0
        driver = Driver(kv)
        driver.add(keys, keys, values)
        found[kv[:3]] = {position: float(value[0]) for position, (_, value) in driver.kept(0).items()}
    assert sorted(found["kvm"].values()) == pytest.approx([0, 0, 0, 1])
    assert sorted(found["d2o"].values()) != pytest.approx([0, 0, 0, 1])


@settings(max_examples=20, deadline=None)
@given(keep=st.integers(12, 60), budget=st.sampled_from(["uniform", "adakv"]), chunks=st.integers(1, 3))
def test_the_threshold_hits_the_budget(keep: int, budget: str, chunks: int) -> None:
    """Whatever keys look like, as many tokens stay as were asked for, on average of the heads: not one less."""
    driver = Driver(f"kvmerger(keep={keep},budget={budget})")
    for index in range(chunks):
        driver.add(*tokens(70, index))
        counts = [len(driver.kept(head)) for head in range(HEADS)]
        assert sum(counts) == keep * HEADS if budget == "adakv" else counts == [keep] * HEADS
        assert min(counts) >= int(0.2 * keep)


def test_one_threshold_for_all_heads_leaves_more_to_those_with_less_similar_keys() -> None:
    q, k, v = tokens(100)
    k[:, 1] = 0.1 * k[:, 1] + k[:1, 1]  # the second head's keys are alike
    driver = Driver("kvmerger(keep=50,budget=adakv)")
    driver.add(q, k, v)
    assert len(driver.kept(0)) > 60
    assert len(driver.kept(1)) < 40


def test_recent_tokens_and_those_with_much_attention_stay_as_they_are() -> None:
    q, k, v = tokens(100)
    k[:] = k[:1] + 0.01 * k  # all are alike
    q[:, :, :] = 0.0
    k[40] = 5.0
    q[41:] = 1.0  # see the one at 40
    driver = Driver("kvmerger(keep=20,recent=0.5,heavy=0.05)")
    driver.add(q, k, v)
    kept = driver.kept(0)
    assert len(kept) == 20
    for position in (40, *range(90, 100)):
        assert torch.equal(kept[position][1], v[position, 0])
    assert any(not torch.equal(value, v[position, 0]) for position, (_, value) in kept.items())


def test_what_no_query_sees_any_more_is_not_merged() -> None:
    """And does not count: all that a window shows stays where there is room for it."""
    layout = LayerLayout(HEADS, DIM, VALUES, 512, heads=HEADS, window=20)
    driver = Driver("kvmerger(keep=100)", layout)
    q, k, v = tokens(60)
    driver.add(q, k, v)
    assert list(driver.kept(0)) == list(range(41, 60))
    assert all(torch.equal(value, v[position, 0]) for position, (_, value) in driver.kept(0).items())


def test_what_is_hidden_is_not_among_those_with_much_attention() -> None:
    """A token that a window hides does not take the place of one that it shows."""
    layout = LayerLayout(HEADS, DIM, VALUES, 512, heads=HEADS, window=60)
    q, k, v = tokens(100)
    q[:], k[:] = 1.0, 0.1 + 0.001 * k  # all keys are alike
    k[20], k[70] = 5.0, 4.0
    driver = Driver("kvmerger(keep=20,recent=0.25,heavy=0.05)", layout)
    driver.add(q, k, v)
    assert torch.equal(driver.kept(0)[70][1], v[70, 0])


def test_settings_that_mean_nothing_are_refused() -> None:
    for kv in ("kvmerger(recent=0.5,heavy=0.5)", "kvmerger(heavy=-1)"):
        with pytest.raises(UsageError):
            compose(kv)
