"""ems merges what resembles something that stays, and drops the rest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kv.merge.layer import HEADS, Driver, Kept, assert_same, tokens

from tightfit.errors import UsageError
from tightfit.kv.compose import compose

WINDOW = 8


def given_to(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """What each query gives to each key of its head, (heads, queries, keys)."""
    scores = torch.einsum("qhd,khd->hqk", q, k)
    return scores.masked_fill(torch.ones(len(k), len(k)).triu(1).bool(), -torch.inf).softmax(-1)


def worth(given: torch.Tensor) -> torch.Tensor:
    """Of one head's tokens: the larger of what all and what the last queries give, where both have the same mean."""
    everywhere, lately = given.sum(0), given[-WINDOW:].sum(0)
    return torch.maximum(everywhere / everywhere.mean(), lately / lately.mean())


def kept(k: torch.Tensor, v: torch.Tensor, worth: torch.Tensor, keep: int, threshold: float, candidates: int) -> Kept:
    """One head of a prompt, as the paper says it."""
    n = len(k)
    last = range(n - min(WINDOW, keep - 1), n)
    centers = [*sorted((p for p in range(n) if p not in last), key=lambda p: -worth[p])[: keep - len(last)], *last]
    others = sorted((p for p in range(n) if p not in centers), key=lambda p: -worth[p])
    classes: dict[int, list[int]] = {center: [center] for center in centers}
    for place in others[:candidates]:
        alike = {
            center: float(
                torch.cosine_similarity(k[place], k[center], dim=0).clamp(min=0)
                * torch.cosine_similarity(v[place], v[center], dim=0).clamp(min=0)
            )
            for center in centers
        }
        center = max(sorted(alike), key=lambda c: alike[c])
        if alike[center] >= threshold:
            classes[center].append(place)
    merged: Kept = {}
    for center, members in sorted(classes.items()):
        weights = worth[members] / worth[members].sum()
        direction = weights @ (k[members] / k[members].norm(dim=1, keepdim=True))
        merged[center] = direction / direction.norm() * (weights @ k[members].norm(dim=1)), weights @ v[members]
    return merged


@settings(max_examples=20, deadline=None)
@given(
    keep=st.integers(10, 30), seed=st.integers(0, 99), threshold=st.sampled_from([0.1, 0.4]), share=st.integers(0, 3)
)
def test_it_merges_as_the_paper_does(keep: int, seed: int, threshold: float, share: int) -> None:
    """Centers by what all and the last queries give; classes by keys and values; means by worth, and the class of
    nothing takes what is unlike all centers, and what is worth least."""
    q, k, v = tokens(60, seed)
    driver = Driver(f"ems(keep={keep},window={WINDOW},threshold={threshold},candidates={share})")
    driver.add(q, k, v)
    given = given_to(q, k)
    for head in range(HEADS):
        found = driver.kept(head)
        assert_same(found, kept(k[:, head], v[:, head], worth(given[head]), keep, threshold, share * keep))


def test_what_resembles_nothing_is_dropped() -> None:
    """Tokens whose keys are alike and whose values are not leave no trace, to the bit; d2o merges them."""
    changed = {}
    staying = [*range(12), *range(76, 80)]
    for kv in ("ems(keep=16,window=4)", "d2o(keep=16,recent=0.25)"):
        q, k, v = (torch.zeros_like(x) for x in tokens(80))
        q[:, :, 0], k[:, :, 0], k[:12, :, 0] = 8.0, 0.1, 1.0  # one direction; the first twelve receive most
        v[:, :, 0] = 1.0  # values of what goes and of what stays have nothing in common
        v[staying] = v[staying].roll(1, 2)
        driver = Driver(kv)
        driver.add(q, k, v)
        assert list(driver.kept(0)) == staying
        changed[kv[:3]] = sum(not torch.equal(x, v[position, 0]) for position, (_, x) in driver.kept(0).items())
    assert changed["ems"] == 0
    assert changed["d2o"] > 0


def test_both_kinds_of_queries_judge() -> None:
    """A token that only the last queries look at stays, and so does one that all others looked at; a method that asks
    one kind of queries loses one of them."""
    q, k, v = tokens(100)
    q[:], k[:] = 0.0, 0.01 * k
    k[10, :, 0] = k[40, :, 1] = 6.0
    q[50:92, :, 0], q[92:, :, 1] = 2.0, 2.0
    stays = {}
    for kv in ("ems(keep=10,window=8)", "h2o(keep=10,recent=0.8)", "snapkv(keep=10,window=8,kernel=1)"):
        driver = Driver(kv)
        driver.add(q, k, v)
        stays[kv[:3]] = {10, 40} & set(driver.kept(0))
    assert stays["ems"] == {10, 40}
    assert stays["sna"] != {10, 40}


def test_while_decoding_the_last_queries_are_those_before() -> None:
    """What all queries gave is kept from the prompt on, and what the last ones gave is theirs alone."""
    driver, (q, k, v) = Driver("ems(keep=40,window=8)"), tokens(64)
    driver.add(q, k, v)
    for index in range(32):
        driver.add(*(x[:1] for x in tokens(1, index + 1)), decode=True)
        driver.commit(1)
    observed = driver.cache.store.observed
    assert observed is not None
    everywhere = observed.mass[0][0, 0, -1, :40]
    assert 60 < float(everywhere.sum()) < 96  # 96 queries gave 1 each, some of it to tokens that are gone
    lately = observed.mass[0][0, 0, :-1, :40].sum(0)
    assert float(lately.sum()) <= 40


def test_settings_that_mean_nothing_are_refused() -> None:
    for kv in ("ems(window=0)", "ems(threshold=2)", "ems(candidates=-1)"):
        with pytest.raises(UsageError):
            compose(kv)
