"""What clusterkv is for; each of these tests fails with another selector in its place."""

from __future__ import annotations

import pytest
import torch
from tests.kv.driver import Layer
from tests.kv.test_methods import DIM, HEADS, KV_HEADS, LAYOUT, VALUES, noise

from tightfit.errors import UsageError
from tightfit.kernels.attention import Scoring
from tightfit.kernels.codec import PAGE
from tightfit.kernels.pages import Looking, Rows
from tightfit.kv.compose import compose
from tightfit.kv.select.by_clusters import ByClusters

PROMPT = 200


def clusters(layer: Layer) -> ByClusters:
    found = layer.cache.store.selecting[0]
    assert isinstance(found, ByClusters)
    return found


def read_by(layer: Layer, query: torch.Tensor) -> list[set[int]]:
    """Of each head which of the clustered tokens a query (dim,) sees."""
    with layer.ws.frame():
        q = query.expand(1, HEADS, DIM).contiguous()
        rows = Rows(torch.tensor([[0, layer.start]], dtype=torch.int32))
        looking = clusters(layer).look(rows, Looking(q), layer.ws, Scoring(DIM**-0.5))
        assert looking.listed is not None
        return [set(of_head[of_head >= 0].tolist()) for of_head in looking.listed[0]]


def test_clusters_are_read_whole_those_with_the_best_centroids_first() -> None:
    layer = Layer("clusterkv(tokens=64,full=0,size=10,sinks=4)", LAYOUT)
    q, k, v = noise(PROMPT, scale=1.0)
    layer.add(q, k, v)
    state = clusters(layer)
    assert state.groups[0].tolist() == [PROMPT // 10] * KV_HEADS
    for seed in range(5):
        query = torch.randn(DIM, generator=torch.Generator().manual_seed(seed))
        for head, read in enumerate(read_by(layer, query)):
            assigned = state.assigned[0, head, :PROMPT]
            assert (assigned[:4] == -1).all()
            assert set(range(4)) <= read  # sinks
            assert len(read) == 64
            members = [set((assigned == number).nonzero()[:, 0].tolist()) for number in range(PROMPT // 10)]
            means = torch.stack([k[sorted(tokens), head].mean(0) for tokens in members])
            ranked = (means @ query).argsort(descending=True).tolist()
            whole = [number for number in ranked if members[number] <= read]
            assert whole == ranked[: len(whole)]
            cut = [number for number in ranked if members[number] & read and not members[number] <= read]
            assert cut in ([], [ranked[len(whole)]])


def test_tokens_are_with_the_centroid_that_is_most_alike() -> None:
    layer = Layer("clusterkv(tokens=64,full=0,size=10,sinks=0)", LAYOUT)
    q, k, v = noise(PROMPT, scale=1.0)
    k[::3] *= 7  # lengths do not matter
    layer.add(q, k, v)
    state = clusters(layer)
    for head in range(KV_HEADS):
        centroids = state.centroids[0, head, : PROMPT // 10]
        alike = torch.cosine_similarity(k[:, head, None], centroids, dim=-1)
        assert torch.equal(alike.argmax(1).int(), state.assigned[0, head, :PROMPT])


@pytest.mark.parametrize(
    ("kv", "finds"), [("clusterkv(tokens=64,full=0,size=10,sinks=0)", True), ("quest(full=0,tokens=64)", False)]
)
def test_a_needle_is_found_that_the_bounds_of_its_page_hide(kv: str, finds: bool) -> None:
    """Its key is no larger in any channel than its neighbours' largest; but it is large in all at once."""
    layer = Layer(kv, LAYOUT)
    q, k, v = noise(PROMPT, scale=1.0)
    needles = [37, 101, 165]  # one alone in its page, far from each other
    k[needles] = 1.2 + 0.1 * torch.randn(3, KV_HEADS, DIM, generator=torch.Generator().manual_seed(3))
    for page in (0, 2, 4):  # pages whose tokens are large in one channel each
        k[page * PAGE : page * PAGE + DIM] = 3 * torch.eye(DIM)[:, None]
    v[:] = 0.0
    v[needles] = 1.0
    layer.add(q, k, v)
    out = layer.add(
        torch.ones(1, HEADS, DIM) * 2, torch.zeros(1, KV_HEADS, DIM), torch.zeros(1, KV_HEADS, VALUES), True
    )
    assert bool((out > 0.9).all()) == finds


def test_new_tokens_are_clustered_every_so_many_and_seen_whole_until_then() -> None:
    layer = Layer("clusterkv(tokens=32,full=0,size=8,every=64,sinks=2)", LAYOUT)
    layer.add(*noise(96, scale=1.0))
    state = clusters(layer)
    for token in range(96, 96 + 160):
        layer.add(*noise(1, seed=token, scale=1.0), decode=True)
        tokens = token + 1
        clustered = 96 + (tokens - 96) // 64 * 64
        assert state.since[0].tolist() == [clustered] * KV_HEADS
        assert state.groups[0].tolist() == [clustered // 8] * KV_HEADS
    # Clusters are made of the new tokens alone.
    assert set(state.assigned[0, 0, 96:160].tolist()) <= set(range(12, 20))


def test_sinks_are_the_first_tokens_however_short_the_first_prompt() -> None:
    layer = Layer("clusterkv(tokens=32,full=0,size=8,every=32,sinks=12)", LAYOUT)
    layer.add(*noise(5))
    layer.add(*noise(90, seed=1, scale=1.0))
    for of_head in clusters(layer).assigned[0, :, :95]:
        assert (of_head[:12] == -1).all()
        assert (of_head[12:] >= 0).all()


def test_clusters_stay_true_where_tokens_are_let_go_of() -> None:
    layer = Layer("h2o(keep=96)+clusterkv(tokens=32,full=0,size=4,every=32,sinks=2)", LAYOUT)
    layer.add(*noise(PROMPT, scale=1.0))
    state = clusters(layer)
    for token in range(PROMPT, PROMPT + 250):  # room for clusters runs out, and all are made anew
        layer.add(*noise(1, seed=token, scale=1.0), decode=True)
    for head in range(KV_HEADS):
        since, used = int(state.since[0, head]), int(state.groups[0, head])
        keys, _ = layer.read(head)
        assigned = state.assigned[0, head, :since].long()
        assert 0 < used <= state.room
        assert torch.equal(state.sizes[0, head, :used].long(), torch.bincount(assigned[assigned >= 0], minlength=used))
        alike = torch.cosine_similarity(keys[:since], state.centroids[0, head, assigned.clamp(min=0)], dim=1)
        assert alike[assigned >= 0].mean() > 0.5


def test_settings_that_mean_nothing_are_refused() -> None:
    for kv in ("clusterkv(size=0)", "clusterkv(every=0)", "clusterkv(tokens=32,sinks=32)", "clusterkv(iterations=0)"):
        with pytest.raises(UsageError, match="clusterkv"):
            compose(kv)
