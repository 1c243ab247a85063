"""elastic merges a prompt into anchors, and lets what is generated go at a fixed point."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kv.merge.layer import HEADS, Driver, assert_same, tokens

from tightfit.errors import UsageError
from tightfit.kv.compose import compose


def looked_at(count: int, anchors: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of which ``anchors`` receive nearly all attention of those behind them."""
    q, k, v = tokens(count)
    q[:], k[:] = 1.0, -1.0 + 0.01 * k
    k[anchors] = 1.0 + 0.01 * k[anchors]
    return q, k, v


@settings(max_examples=10, deadline=None)
@given(anchors=st.sets(st.integers(1, 20), min_size=1, max_size=5))
def test_neighbours_go_into_the_nearest_anchor_as_a_mean(anchors: set[int]) -> None:
    """Before or behind them, the earlier of two at the same distance; the first and the last token stay alone."""
    ordered = sorted(anchors)
    q, k, v = looked_at(80, ordered)
    driver = Driver(f"elastic(keep={len(ordered) + 2})")
    driver.add(q, k, v)
    members: dict[int, list[int]] = {anchor: [] for anchor in ordered}
    for place in range(1, 79):
        members[min(ordered, key=lambda anchor: (abs(anchor - place), anchor))].append(place)
    for head in range(HEADS):
        wanted = {0: (k[0, head], v[0, head])}
        wanted |= {anchor: (k[of, head].mean(0), v[of, head].mean(0)) for anchor, of in members.items()}
        wanted[79] = k[79, head], v[79, head]
        assert_same(driver.kept(head), wanted)


def test_all_heads_of_a_layer_have_the_same_anchors() -> None:
    """Where other methods that count attention let each head choose."""
    kept = {}
    for kv in ("elastic(keep=10)", "h2o(keep=10)", "kvmerger(keep=10)"):
        driver = Driver(kv)
        driver.add(*tokens(60))
        kept[kv] = [list(driver.kept(head)) for head in range(HEADS)]
    assert kept["elastic(keep=10)"][0] == kept["elastic(keep=10)"][1]
    assert kept["h2o(keep=10)"][0] != kept["h2o(keep=10)"][1]
    assert kept["kvmerger(keep=10)"][0] != kept["kvmerger(keep=10)"][1]


def test_generated_tokens_go_at_a_fixed_point_unmerged() -> None:
    """The beginning of what was kept of the prompt stays to the bit, and so do the last tokens; between them, those at
    the fixed point go. A method that merges or scores would change what stays."""
    driver = Driver("elastic(keep=40,offset=12)")
    driver.add(*tokens(100))
    before = driver.kept(0)
    assert len(before) == 40
    for index in range(92):  # three times 32 tokens, the first time with 4 of the prompt's last page
        driver.add(*tokens(1, index + 1), decode=True)
        driver.commit(1)
    after = driver.kept(0)
    assert list(after) == [*list(before)[:28], *range(180, 192)]
    for position in list(before)[:28]:
        assert torch.equal(after[position][1], before[position][1])
    assert torch.equal(after[191][1], tokens(1, 92)[2][0, 0])


def test_with_a_share_the_fixed_point_stays_where_the_prompt_ended() -> None:
    """And what is kept grows behind it."""
    driver = Driver("elastic(keep=0.5,offset=10)")
    driver.add(*tokens(96))
    before = list(driver.kept(0))
    for index in range(64):
        driver.add(*tokens(1, index + 1), decode=True)
        driver.commit(1)
    assert list(driver.kept(0)) == [*before[:38], *range(160 - 42, 160)]


def test_settings_that_mean_nothing_are_refused() -> None:
    for kv in ("elastic(sinks=-1)", "elastic(offset=0)"):
        with pytest.raises(UsageError):
            compose(kv)
