"""Lists of tokens hold the best by score, whole groups first, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.kernels import cpu, lists


@pytest.fixture(autouse=True, params=[cpu.supported()[0], cpu.REFERENCE])
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    chosen = cpu.features()["chosen"]
    cpu.use(request.param)
    yield
    cpu.use(chosen)


def listed(
    scores: torch.Tensor, most: int, groups: torch.Tensor | None = None, least: float = lists.EVERY
) -> list[int]:
    found, order = torch.full((most,), 99, dtype=torch.int32), torch.empty(2, len(scores), dtype=torch.int32)
    lists.list_best(scores, found, order, groups, least)
    some = [token for token in found.tolist() if token >= 0]
    assert found.tolist() == some + [-1] * (most - len(some))
    return some


@given(seed=st.integers(0, 1 << 20), tokens=st.integers(0, 60), most=st.integers(1, 70), least=st.sampled_from([-9, 0]))
@settings(max_examples=40, deadline=None)
def test_the_highest_scores_are_listed_in_order(seed: int, tokens: int, most: int, least: int) -> None:
    torch.manual_seed(seed)
    scores = torch.randint(-3, 4, (tokens,)).float()  # many are equal: the first win
    ranked = sorted((i for i in range(tokens) if scores[i] >= least), key=lambda i: (-scores[i], i))
    assert listed(scores, most, least=least) == sorted(ranked[:most])


@given(seed=st.integers(0, 1 << 20), tokens=st.integers(0, 90), most=st.integers(1, 70), groups=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_groups_are_listed_whole_and_the_last_as_far_as_it_fits(seed: int, tokens: int, most: int, groups: int) -> None:
    torch.manual_seed(seed)
    scores, of_token = torch.randn(groups), torch.randint(-1, groups, (tokens,), dtype=torch.int32)
    expected = [i for i in range(tokens) if of_token[i] < 0]
    for group in scores.argsort(descending=True).tolist():
        expected += [i for i in range(tokens) if of_token[i] == group]
    assert listed(scores, most, of_token) == sorted(expected[:most])


@given(seed=st.integers(0, 1 << 20), dim=st.sampled_from([1, 15, 40, 64]), scale=st.sampled_from([0.1, 1.0]))
@settings(max_examples=20, deadline=None)
def test_centroids_score_as_the_query_that_wants_them_most(seed: int, dim: int, scale: float) -> None:
    torch.manual_seed(seed)
    centroids, q, scores, scratch = (
        torch.randn(9, dim),
        torch.randn(3, dim + 2)[:, :dim],
        torch.empty(9),
        torch.empty(9),
    )
    lists.score_centroids(centroids, q, scores, scratch)
    torch.testing.assert_close(scores, (q @ centroids.T).amax(0), rtol=1e-5, atol=1e-5)
    sizes = torch.randint(0, 4, (9,), dtype=torch.int32)
    sizes[0] = 1
    lists.score_centroids(centroids, q, scores, scratch, sizes, scale)
    keys = centroids.repeat_interleave(sizes, 0)  # each key as its centroid
    shares = (q @ keys.T * scale).softmax(1).amax(0)
    torch.testing.assert_close(scores.repeat_interleave(sizes), shares, rtol=1e-4, atol=1e-6)
    assert (scores[sizes == 0] == 0).all()
