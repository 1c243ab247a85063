import numpy as np
import pytest
from scipy import stats

from tightfit.lab import statistics
from tightfit.lab.statistics import Estimate, difference, estimate, wilson

RNG = np.random.default_rng(3)


def rows(values):
    return [[float(value)] for value in values]


@pytest.mark.parametrize("name", ["mean", "median"])
def test_intervals_are_those_of_scipys_percentile_bootstrap(name):
    values = RNG.lognormal(size=60)
    found = estimate(rows(values), statistics.STATISTICS[name])
    theirs = stats.bootstrap(
        (values,), getattr(np, name), n_resamples=20000, method="percentile", rng=1, vectorized=True
    ).confidence_interval
    width = theirs.high - theirs.low
    assert found.value == pytest.approx(getattr(np, name)(values))
    # 2000 draws place a percentile of 2.5 to within a few percent of the width.
    assert abs(found.low - theirs.low) < 0.07 * width
    assert abs(found.high - theirs.high) < 0.07 * width
    assert found.samples == 60


def test_intervals_of_means_hold_the_truth_about_as_often_as_they_say():
    held = 0
    for _ in range(200):
        found = estimate(rows(RNG.exponential(size=40)))
        held += found.low <= 1.0 <= found.high
    assert 0.88 <= held / 200 <= 0.99  # 95%, less what percentile intervals of skewed values lack, and chance


def test_the_same_samples_give_the_same_interval():
    values = rows(RNG.normal(size=30))
    assert estimate(values) == estimate(values)


@pytest.mark.parametrize(("right", "trials"), [(0, 12), (12, 12), (3, 17), (1, 1)])
def test_wilsons_interval_is_scipys(right, trials):
    theirs = stats.binomtest(right, trials).proportion_ci(method="wilson")
    assert wilson(right, trials) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("value", [0, 1])
def test_shares_that_are_all_alike_are_not_taken_for_certain(value):
    found = estimate(rows([value] * 12), share=True)
    assert (found.low, found.high) == wilson(12 * value, 12)
    assert found.high - found.low > 0.2
    paired = difference(rows([value] * 12), rows([value] * 12), share=True)
    assert (paired.value, paired.low, paired.high) == (0, -wilson(0, 12)[1], wilson(0, 12)[1])
    apart = difference(rows([value] * 12), rows([1 - value] * 12), share=True)
    assert apart.value == 2 * value - 1
    assert 0.3 < apart.high - apart.low < 1


def test_one_sample_and_maxima_have_no_interval():
    assert estimate(rows([3])) == Estimate(3, None, None, 1)
    assert estimate(rows([1, 5, 2]), statistics.maximum) == Estimate(5, None, None, 3)
    assert difference(rows([1, 5]), rows([1, 2]), statistics.maximum) == Estimate(3, None, None, 2)


def test_paired_intervals_leave_out_what_samples_have_in_common():
    hardness = RNG.normal(scale=10, size=50)
    ours, theirs = hardness + RNG.normal(0.5, 0.1, 50), hardness
    found, alone = difference(rows(ours), rows(theirs)), estimate(rows(ours))
    assert found.value == pytest.approx((ours - theirs).mean())
    assert found.low > 0.4
    assert found.high < 0.6
    assert alone.high - alone.low > 2
    with pytest.raises(ValueError, match="no pairs"):
        difference(rows(ours), rows(theirs[1:]))


def test_ratios_are_of_sums():
    pairs = np.stack([RNG.uniform(1, 2, 40), RNG.integers(1, 9, 40)], axis=-1)
    found = estimate(pairs.tolist(), statistics.ratio)
    assert found.value == pytest.approx(pairs[:, 0].sum() / pairs[:, 1].sum())
    theirs = stats.bootstrap(
        tuple(pairs.T), lambda a, b: a.sum() / b.sum(), paired=True, vectorized=False, method="percentile", rng=2
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(found.low - theirs.low) < 0.1 * width
    assert abs(found.high - theirs.high) < 0.1 * width
    assert estimate([[0.0, 0.0]] * 3, statistics.ratio).value == 0
