"""What each policy keeps, on traces where the others would keep something else."""

from __future__ import annotations

import pytest
import torch

from tightfit.errors import UsageError
from tightfit.experts import Lfu, Lru, Policy, Ranking, Score, Static, scheme
from tightfit.experts.census import Census

LAYERS, EXPERTS, PER_TOKEN = 2, 6, 2


def ranking(policy: Policy, shares: list[list[float]] | None = None) -> Ranking:
    census = None if shares is None else Census("model", 10, shares)
    return policy.ranking(LAYERS, EXPERTS, PER_TOKEN, census)


def scores(*values: float) -> torch.Tensor:
    rows = torch.tensor([values], dtype=torch.float64)
    return rows / rows.sum()


EVEN = scores(*[1.0] * EXPERTS)


def worst_of(ranking: Ranking, layer: int, *held: int) -> int:
    return min(held, key=lambda expert: float(ranking.worth[layer, expert]))


def test_lru_lets_go_of_what_was_not_used_for_longest() -> None:
    found = ranking(Lru())
    for experts in ([0, 1], [2, 3], [0, 2]):
        found.used(0, experts, EVEN)
    assert worst_of(found, 0, 0, 1, 2, 3) == 1
    assert worst_of(found, 0, 0, 2, 3) == 3


def test_lfu_lets_go_of_what_was_used_least_often_and_of_equals_of_the_older() -> None:
    found = ranking(Lfu())
    for experts in ([0, 1], [0, 1], [0, 2], [3, 4]):
        found.used(0, experts, EVEN)
    assert worst_of(found, 0, 0, 1, 2) == 2  # lru would let go of 1
    assert worst_of(found, 0, 2, 3) == 2


def test_score_keeps_what_was_nearly_chosen() -> None:
    found = ranking(Score())
    for _ in range(4):
        found.used(0, [0, 1], scores(0.4, 0.3, 0.2, 0.05, 0.03, 0.02))
    assert worst_of(found, 0, 2, 3) == 3
    assert found.worth[0, 2] > 0  # never used
    assert found.worth[0, 4] == found.worth[0, 5] == 0  # not among twice as many as are chosen
    assert not found.worth[1].any()


def test_score_forgets_at_the_rate_of_alpha() -> None:
    found = ranking(Score(alpha=0.25, top=1))
    found.used(0, [0, 1], scores(0.6, 0.4, 0, 0, 0, 0))
    found.used(0, [2, 3], scores(0, 0, 0.5, 0.5, 0, 0))
    assert found.worth[0].tolist() == pytest.approx([0.25 * 0.75 * 0.6, 0.25 * 0.75 * 0.4, 0.125, 0.125, 0, 0])


def test_static_begins_with_what_a_text_activated_most_and_never_changes() -> None:
    shares = [[0.1, 0.9, 0.0, 0.2, 0.3, 0.5], [0.8, 0.0, 0.4, 0.6, 0.1, 0.1]]
    found = ranking(Static(), shares)
    assert found.first(4) == [(0, 1), (1, 0), (1, 3), (0, 5)]
    before = found.worth.clone()
    found.used(0, [2, 3], EVEN)
    assert torch.equal(found.worth, before)


@pytest.mark.parametrize("policy", [Lru(), Lfu(), Score()])
def test_others_begin_with_nothing(policy: Policy) -> None:
    assert ranking(policy).first(4) == []


def test_a_scheme_is_one_policy_and_perhaps_a_predictor() -> None:
    assert scheme("lru").policy == Lru()
    assert not scheme("lru").ahead
    assert scheme("score(alpha=0.5)+gate").policy == Score(alpha=0.5)
    assert scheme("gate+lfu").ahead
    for text in ("gate", "lru+lfu", "lru+gate+gate"):
        with pytest.raises(UsageError, match="names"):
            scheme(text)
    with pytest.raises(UsageError, match="gate, lfu, lru, score, static"):
        scheme("mru")
    with pytest.raises(UsageError, match="alpha"):
        scheme("score(alpha=2)")
