"""What squeezed is for; each of these tests fails with another selector in its place."""

from __future__ import annotations

import pytest
import torch
from tests.kv.driver import Layer
from tests.kv.select.test_clusterkv import clusters, read_by
from tests.kv.test_methods import DIM, GROUPS, HEADS, KV_HEADS, LAYOUT, noise

from tightfit.errors import UsageError
from tightfit.kernels import cpu
from tightfit.kernels.codec import PAGE
from tightfit.kv.compose import compose

PREFIX = 192


def test_only_the_fixed_context_is_clustered_and_all_that_follows_is_read() -> None:
    """Of the fixed context a third at most: the rest of it is made unreadable."""
    layer = Layer(f"squeezed(tokens=64,full=0,size=8,prefix={PREFIX})", LAYOUT)
    q, k, v = noise(150, scale=1.0)
    layer.add(q, k, v)
    state = clusters(layer)
    assert state.since[0].tolist() == [0] * KV_HEADS  # it is not there yet
    layer.add(*noise(70, seed=1, scale=1.0))
    assert state.since[0].tolist() == [PREFIX] * KV_HEADS
    made = state.centroids.clone()
    for token in range(220, 300):
        layer.add(*noise(1, seed=token, scale=1.0), decode=True)
    layer.add(*noise(40, seed=2, scale=1.0))
    assert torch.equal(made, state.centroids)  # once
    assert state.since[0].tolist() == [PREFIX] * KV_HEADS
    query = torch.randn(DIM, generator=torch.Generator().manual_seed(5))
    for head, read in enumerate(read_by(layer, query)):
        assert 0 < len(read) <= PREFIX / 3
        for token in set(range(PREFIX)) - read:
            page = int(layer.pages.table[0, head, token // PAGE])
            layer.pages.keys[0, page, token % PAGE] = torch.nan
    asked = query.expand(1, HEADS, DIM).contiguous()
    assert layer.add(asked, *noise(1, seed=3)[1:], decode=True).isfinite().all()
    page = int(layer.pages.table[0, 0, 320 // PAGE])  # of what follows none may be missing
    layer.pages.keys[0, page, 0] = torch.nan
    assert layer.add(asked, *noise(1, seed=4)[1:], decode=True)[0, :GROUPS].isnan().all()


@pytest.mark.parametrize("level", cpu.supported())
def test_what_is_not_clustered_yet_is_read_whole(level: str) -> None:
    """A prompt that is shorter than the fixed context."""
    chosen, outs = cpu.features()["chosen"], []
    try:
        cpu.use(level)
        for kv in (f"squeezed(tokens=32,full=0,prefix={PREFIX})", "h2o(keep=512)"):
            layer = Layer(kv, LAYOUT)
            layer.add(*noise(70, scale=1.0))
            outs.append(layer.add(*noise(1, seed=1, scale=1.0), decode=True))
    finally:
        cpu.use(chosen)
    torch.testing.assert_close(*outs)


def test_without_a_number_the_context_ends_before_the_last_hundred_tokens() -> None:
    layer = Layer("squeezed(tokens=32,full=0)", LAYOUT)
    layer.add(*noise(230))
    assert clusters(layer).since[0].tolist() == [130] * KV_HEADS
    layer.add(*noise(230, seed=1))  # what is asked next does not change it
    assert clusters(layer).since[0].tolist() == [130] * KV_HEADS


def test_clusters_are_read_by_the_share_of_attention_that_their_keys_would_get() -> None:
    """A query that wants one direction reads little; one that wants nothing reads as much as may be read."""
    layer = Layer(f"squeezed(tokens=96,full=0,size=8,prefix={PREFIX},least=1)", LAYOUT)
    q, k, v = noise(PREFIX, scale=0.3)
    k[40:48] = 6 * torch.eye(DIM)[3] + 0.1 * k[40:48]
    layer.add(q, k, v)
    state = clusters(layer)
    sharp, blunt = read_by(layer, 4 * torch.eye(DIM)[3]), read_by(layer, torch.eye(DIM)[3] * 0)
    for head in range(KV_HEADS):
        assert set(range(40, 48)) <= sharp[head]
        assert len(sharp[head]) < 32
        assert len(blunt[head]) == 96  # all shares are even
        query, scale = 4 * torch.eye(DIM)[3], DIM**-0.5
        used = int(state.groups[0, head])
        assigned, centroids = state.assigned[0, head, :PREFIX].long(), state.centroids[0, head, :used]
        shares = (centroids[assigned] @ query * scale).softmax(0)
        assert sharp[head] == set((shares >= 1 / PREFIX).nonzero()[:, 0].tolist())


def test_settings_that_mean_nothing_are_refused() -> None:
    for kv in ("squeezed(size=0)", "squeezed(prefix=-1)", "squeezed(least=-1)", "squeezed+quest"):
        with pytest.raises(UsageError, match="squeezed"):
            compose(kv)
