"""What d2o lets go of lives on in what it keeps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kv.merge.layer import DIM, HEADS, VALUES, Driver, Kept, assert_same, tokens

from tightfit.errors import UsageError
from tightfit.kernels import cpu
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose


class Slow:
    """Merges token by token, as the formulas of the paper do."""

    def __init__(self, ema: float) -> None:
        self.ema, self.threshold = ema, math.nan

    def merge(self, there: Kept, stays: set[int]) -> Kept:
        leaving = {position: pair for position, pair in there.items() if position not in stays}
        kept = {position: pair for position, pair in there.items() if position in stays}
        if not leaving:
            return kept
        best = {}
        for position, (key, _) in leaving.items():
            cosines = {other: float(torch.cosine_similarity(key, k, dim=0)) for other, (k, _) in kept.items()}
            best[position] = max((cosine, other) for other, cosine in cosines.items())
        mean = sum(cosine for cosine, _ in best.values()) / len(best)
        self.threshold = mean if math.isnan(self.threshold) else self.ema * mean + (1 - self.ema) * self.threshold
        merged = {}
        for position, (key, value) in kept.items():
            weights, k, v = math.e, math.e * key, math.e * value
            for source, (cosine, other) in best.items():
                if other == position and cosine >= self.threshold:
                    weights += math.exp(cosine)
                    k, v = k + math.exp(cosine) * leaving[source][0], v + math.exp(cosine) * leaving[source][1]
            merged[position] = k / weights, v / weights
        return merged


@settings(max_examples=25, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    decoded=st.integers(0, 70),
    keep=st.integers(2, 40),
    budget=st.sampled_from(["uniform", "adakv"]),
    ema=st.sampled_from([0.7, 1.0, 0.0]),
    shared=st.booleans(),
    kernels=st.sampled_from([cpu.supported()[0], cpu.REFERENCE]),
)
def test_it_merges_as_the_paper_does(
    chunks: list[int], decoded: int, keep: int, budget: str, ema: float, shared: bool, kernels: str
) -> None:
    """Whatever was merged before, in prompts and while decoding, and with any number of tokens in each head."""
    layout = LayerLayout(HEADS, DIM, VALUES, 512, heads=HEADS, shared=shared)
    cpu.use(kernels)
    try:
        driver = Driver(f"d2o(keep={keep},budget={budget},ema={ema})", layout)
        slow, wanted = [Slow(ema) for _ in range(HEADS)], [Kept() for _ in range(HEADS)]
        for index, count in enumerate([*chunks, *[1] * decoded]):
            q, k, v = tokens(count, index)
            v = k[..., :VALUES] if shared else v
            start, decode = driver.start, index >= len(chunks)
            driver.add(q, k, v, decode)
            if decode:
                driver.commit(1)
            for head in range(HEADS):
                wanted[head] |= {start + i: (k[i, head], v[i, head]) for i in range(count)}
                if not decode or driver.start % 32 == 0:
                    wanted[head] = slow[head].merge(wanted[head], set(driver.kept(head)))
                    assert_same(driver.kept(head), wanted[head])
    finally:
        cpu.use(cpu.supported()[0])


def test_what_is_let_go_of_is_seen_in_what_stays() -> None:
    """h2o loses it; d2o keeps a part that only depends on how similar the keys are."""
    outs = {}
    for kv in ("h2o(keep=2,recent=0.5)", "d2o(keep=2,recent=0.5)"):
        driver = Driver(kv)
        k = torch.zeros(3, HEADS, DIM)
        k[0, :, 0], k[1, :, 0], k[2, :, 1] = 4.0, 5.0, 1.0  # the second gets more than the first, which is like it
        v = torch.zeros(3, HEADS, VALUES)
        v[0, :, 0], v[1, :, 1], v[2, :, 2] = 1.0, 1.0, 1.0
        driver.add(k[:1].expand(3, -1, -1), k, v)
        assert list(driver.kept(0)) == [1, 2]
        outs[kv[:3]] = driver.kept(0)[1][1]
    assert outs["h2o"].tolist() == [0, 1, 0, 0, 0, 0]
    torch.testing.assert_close(outs["d2o"], torch.tensor([0.5, 0.5, 0, 0, 0, 0]))  # cosine 1: both weigh e


def test_what_is_unlike_everything_is_dropped() -> None:
    """Below the threshold nothing changes, to the bit."""
    driver = Driver("d2o(keep=4,recent=1)")
    k, v = torch.zeros(6, HEADS, DIM), tokens(6)[2]
    for i, place in enumerate([0, 7, 0, 1, 2, 3]):  # the second points where no other does
        k[i, :, place] = 1.0 + i
    driver.add(k, k, v)
    kept = driver.kept(0)
    assert list(kept) == [2, 3, 4, 5]
    torch.testing.assert_close(kept[2][1], (v[0, 0] + v[2, 0]) / 2)
    for i in (3, 4, 5):
        assert torch.equal(kept[i][0], k[i, 0])
        assert torch.equal(kept[i][1], v[i, 0])
    threshold = driver.cache.store.merging[0].memory[0, 0, 0]
    torch.testing.assert_close(threshold, torch.tensor(0.5))  # the mean of 1 and 0


def test_the_threshold_begins_anew_with_a_sequence() -> None:
    """And what a head decided before leaves no trace."""
    results = []
    driver = Driver("d2o(keep=16)")
    for _ in range(2):
        driver.cache._begun[0] = False
        driver.cache.tokens[0] = 0
        driver.add(*tokens(60))
        results.append((driver.cache.store.merging[0].memory.clone(), driver.kept(0)))
        driver.add(*tokens(50, seed=1))
        assert not torch.equal(driver.cache.store.merging[0].memory, results[0][0])
    assert torch.equal(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])


def test_tentative_tokens_leave_no_trace() -> None:
    """Drafts that are refused change neither the threshold nor what is kept."""
    plain, drafting = Driver("d2o(keep=16)", tail=4), Driver("d2o(keep=16)", tail=4)
    for driver in (plain, drafting):
        driver.add(*tokens(30))
    for index in range(2, 40):
        q, k, v = tokens(1, index)
        plain.add(q, k, v, decode=True)
        plain.commit(1)
        refused = min(3, drafting.cache.room(0) - 1)
        wrong = [torch.cat([x, 9 * torch.ones(refused, *x.shape[1:])]) for x in (q, k, v)]
        memory = drafting.cache.store.merging[0].memory.clone()
        drafting.add(*wrong, decode=True)
        torch.testing.assert_close(drafting.cache.store.merging[0].memory, memory, equal_nan=True, rtol=0, atol=0)
        drafting.commit(1)
    assert torch.equal(plain.cache.store.merging[0].memory, drafting.cache.store.merging[0].memory)
    for head in range(HEADS):
        assert_same(drafting.kept(head), plain.kept(head))


def test_what_no_query_sees_any_more_is_not_merged() -> None:
    """A layer's window ends for what was merged, too."""
    layout = LayerLayout(HEADS, DIM, VALUES, 512, heads=HEADS, window=20)
    driver = Driver("d2o(keep=100)", layout)
    q, k, v = tokens(60)
    driver.add(q, k, v)
    for head in range(HEADS):
        kept = driver.kept(head)
        assert list(kept) == list(range(41, 60))
        assert all(torch.equal(value, v[position, head]) for position, (_, value) in kept.items())


def test_it_takes_what_h2o_does_and_a_number_for_each_head() -> None:
    small = Driver("d2o(keep=40)").bytes - Driver("h2o(keep=40)").bytes
    assert 4 * HEADS <= small <= 4 * HEADS + 64


@pytest.mark.parametrize("more", ["int4(recent=32)", "think(recent=32)", "quest(tokens=32,full=0)", "int8(recent=0)"])
def test_it_composes(more: str) -> None:
    """What is coded, pruned or selected was merged; a file changes nothing."""
    outs = {}
    for kv in (f"h2o(keep=100)+{more}", f"d2o(keep=100)+{more}", f"d2o(keep=100)+{more}+host(resident=0)"):
        driver, got = Driver(kv), []
        for index, (count, decode) in enumerate([(90, False), (80, False), *[(1, True)] * 70]):
            got.append(driver.add(*tokens(count, index), decode))
            if decode:
                driver.commit(1)
        outs[kv] = torch.cat(got)
        assert outs[kv].isfinite().all()
        driver.cache.close()
    h2o, d2o, in_file = outs.values()
    assert not torch.equal(h2o, d2o)
    torch.testing.assert_close(d2o, in_file, rtol=0, atol=1e-6)


def test_settings_that_mean_nothing_are_refused() -> None:
    for kv in ("d2o(ema=2)", "d2o(recent=-1)", "d2o(keep=1,recent=1)"):
        with pytest.raises(UsageError):
            compose(kv)
    with pytest.raises(UsageError, match="both for the tokens"):
        compose("d2o+h2o")
