"""Attention over a window in memory, and over the old tokens in a file that mattered to a head, is that over both."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kv.driver import Layer
from tests.parity.harness import ROOM

from tightfit.budget.ledger import Arena
from tightfit.kernels.pages import PAGE
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.offload.sparse import SparseStore
from tightfit.kv.paged import PagedCache

LAYOUT = LayerLayout(2, 32, 16, 0, heads=4)
KEEP, LAST = 64, 32  # the window, and the queries by which tokens are judged


def random_tokens(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(count, LAYOUT.heads, LAYOUT.key_dim, generator=generator)
    return q, *(torch.randn(count, LAYOUT.kv_heads, dim, generator=generator) for dim in (32, 16))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Of one query (heads, 32) over the tokens that its heads' groups have ``seen`` (kv_heads, n)."""
    out = []
    for head, query in enumerate(q):
        scores = (k[:, head // 2] @ query * 32**-0.5).masked_fill(~seen[head // 2], -torch.inf)
        out.append(scores.softmax(0) @ v[:, head // 2])
    return torch.stack(out)


def sparse(layer: Layer) -> SparseStore:
    store = layer.cache.store.lower[0]
    assert isinstance(store, SparseStore)
    return store


@settings(max_examples=20, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 160), min_size=1, max_size=3), decoded=st.integers(1, 70), seed=st.integers(0, 99)
)
def test_where_nothing_is_dropped_both_parts_are_all_of_attention(chunks: list[int], decoded: int, seed: int) -> None:
    """A window alone drops what is older."""
    layer, count = Layer(f"hgca(keep={KEEP},beta=0)", LAYOUT), sum(chunks)
    q, k, v = random_tokens(count + decoded, seed)
    at = 0
    for size in chunks:
        found = layer.add(q[at : at + size], k[at : at + size], v[at : at + size])
        at += size
    everything = torch.ones(2, count, dtype=torch.bool)
    expected = attention(q[count - 1], k[:count], v[:count], everything)
    torch.testing.assert_close(found[-1], expected, rtol=0, atol=1e-5)
    found = layer.add(q[count:], k[count:], v[count:], decode=True)
    everything = torch.ones(2, count + decoded, dtype=torch.bool)
    torch.testing.assert_close(found[-1], attention(q[-1], k, v, everything), rtol=0, atol=1e-5)
    layer.cache.close()


@settings(max_examples=20, deadline=None)
@given(length=st.integers(KEEP + LAST + 8, 400), beta=st.sampled_from([0.5, 1.0, 3.0]), seed=st.integers(0, 99))
def test_each_head_sees_the_old_tokens_that_mattered_to_it(length: int, beta: float, seed: int) -> None:
    """Those whose mean weight from the last queries of the prompt is at least ``beta`` even shares, be they many for a
    head that looks around and few for another; methods that keep as many for each head see something else."""
    layer = Layer(f"hgca(keep={KEEP},beta={beta})", LAYOUT)
    q, k, v = random_tokens(length + 1, seed)
    q[:, :2] *= 3  # the first key-value head's queries look at few tokens
    layer.add(q[:-1], k[:-1], v[:-1])
    weights = torch.stack([(k[:-1, head // 2] @ q[:-1, head].T).T * 32**-0.5 for head in range(4)])
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = weights.masked_fill(hidden, -torch.inf).softmax(2)[:, -LAST:]
    share = weights.unflatten(0, (2, 2)).mean((1, 2)) * length
    seen = share >= beta
    seen[:, length - KEEP :] = True
    seen = torch.cat([seen, torch.ones(2, 1, dtype=torch.bool)], 1)
    old = share[:, : length - KEEP]
    for head in range(2):
        assert abs(sparse(layer).count(0, head) - int((old[head] >= beta).sum())) <= int(
            ((old - beta).abs() < 1e-3).sum()
        )
    assert sparse(layer).count(0, 0) < sparse(layer).count(0, 1) or beta == 3.0
    if float((old - beta).abs().min()) > 1e-4:
        found = layer.add(q[-1:], k[-1:], v[-1:], decode=True)[0]
        torch.testing.assert_close(found, attention(q[-1], k, v, seen), rtol=0, atol=1e-5)
    layer.cache.close()


def test_old_tokens_are_judged_again_by_the_next_chunk() -> None:
    """A token that nobody looked at matters once a later part of the prompt does."""
    layer = Layer(f"hgca(keep={KEEP})", LAYOUT)
    q, k, v = random_tokens(300, 5)
    k[7] = 0
    k[7, :, 0] = 8  # seen by queries along the first channel only
    q[:, :, 0], q[200:, :, 0] = -4, 4
    layer.add(q[:200], k[:200], v[:200])
    assert 7 not in sparse(layer).listed[0, 0].tolist()
    layer.add(q[200:], k[200:], v[200:])
    assert 7 in sparse(layer).listed[0, 0].tolist()
    layer.cache.close()


@settings(max_examples=10, deadline=None)
@given(first=st.integers(KEEP + 40, 200), second=st.integers(LAST, 300), seed=st.integers(0, 99))
def test_old_tokens_are_judged_by_what_all_tokens_so_far_would_get(first: int, second: int, seed: int) -> None:
    """An even share is one of all tokens that the queries see, those of their own chunk too."""
    layer, total, old = Layer(f"hgca(keep={KEEP})", LAYOUT), first + second, first - KEEP
    q, k, v = random_tokens(total, seed)
    layer.add(q[:first], k[:first], v[:first])
    layer.add(q[first:], k[first:], v[first:])
    hidden = torch.ones(total, total, dtype=torch.bool).triu(1)[-LAST:]
    for head in range(2):
        scores = torch.stack([q[-LAST:, each] @ k[:, head].T for each in (2 * head, 2 * head + 1)]) * 32**-0.5
        share = scores.masked_fill(hidden, -torch.inf).softmax(2).mean((0, 1))[:old] * total
        found = torch.zeros(old, dtype=torch.bool)
        listed = sparse(layer).listed[0, head]
        found[listed[(listed >= 0) & (listed < old)].long()] = True
        near = (share - 1).abs() < 1e-3
        assert torch.equal(found | near, (share >= 1) | near)
    layer.cache.close()


def reserved(kv: str, context: int) -> int:
    layouts, arena = [LayerLayout(4, 64, 64, context, heads=8)] * 3, Arena(ROOM)
    PagedCache(layouts, compose(kv), context, 1, torch.bfloat16, arena).close()
    return arena.used


def test_memory_stays_at_the_window_whatever_the_context() -> None:
    """But for where old pages lie and which old tokens matter, an int32 each."""
    growth = reserved("hgca(keep=512)", 32768) - reserved("hgca(keep=512)", 16384)
    assert growth == 3 * 4 * (16384 // PAGE + 16384) * 4
    assert growth < 0.02 * (reserved("int8", 32768) - reserved("int8", 16384)) * 2
