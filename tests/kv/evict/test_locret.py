"""Retaining heads rate tokens when they come, and trained ones better than others."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tests.kv.driver import Layer, Tiny
from tests.kv.test_bytes import REAL

from tightfit.budget.ledger import Arena
from tightfit.engine.engine import Engine, Workspace
from tightfit.engine.fit import Observing
from tightfit.errors import UsageError
from tightfit.kernels.attention import Scoring
from tightfit.kv.base import BLOCK, LayerLayout
from tightfit.kv.cache import Cache
from tightfit.kv.compose import known_of
from tightfit.kv.evict.locret import Locret, _example
from tightfit.kv.fitted import Findings, Known, Sample, write_findings
from tightfit.kv.make import kv_nbytes
from tightfit.model.decoder import cache_layouts

KV_HEADS, GROUPS, DIM = 2, 2, 16
HEADS = KV_HEADS * GROUPS
LAYOUT = LayerLayout(KV_HEADS, DIM, DIM, 1024, heads=HEADS)


def heads_of(*layouts: LayerLayout, hidden: int = 2) -> Known:
    """Heads that rate a token by the first number of each head's value."""
    tensors = {}
    for layer, layout in enumerate(layouts):
        queries, keys = layout.heads * layout.key_dim, layout.kv_heads * layout.key_dim
        first = torch.zeros(hidden, queries + keys + layout.kv_heads * layout.value_dim)
        second = torch.zeros(layout.kv_heads, hidden)
        for head in range(min(layout.kv_heads, hidden)):
            first[head, queries + keys + head * layout.value_dim] = 1.0
            second[head, head] = 1.0
        tensors |= {f"first.{layer}": first, f"second.{layer}": second}
    return Known(tensors={"locret": tensors})


def test_locret_keeps_what_was_rated_highest_when_it_came_whatever_is_looked_at() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(300, HEADS, DIM, generator=generator)
    k, v = (torch.randn(300, KV_HEADS, DIM, generator=generator) for _ in range(2))
    v[:, :, 0] = v[:, :, 0].abs()  # where the activation ascends
    k[100] = 30 * q[-20:].mean((0, 1))  # what queries look at
    v[100, :, 0] = 0.0
    layer = Layer("locret(keep=40,recent=8,hidden=2)", LAYOUT, 1024, heads_of(LAYOUT))
    for a in range(0, 256, 64):
        layer.add(q[a : a + 64], k[a : a + 64], v[a : a + 64])
    layer.add(q[256:], k[256:], v[256:], decode=True)
    for head in range(KV_HEADS):
        found = layer.positions(head)
        settled = 288  # what was judged last
        for best in v[: settled - 8, head, 0].topk(20).indices.tolist():
            assert best in found
        assert 100 not in found
        assert found[-20:] == list(range(280, 300))


def test_drafts_bring_the_ratings_of_those_that_are_accepted() -> None:
    layer = Layer("locret(keep=34,recent=0,hidden=2)", LAYOUT, 1024, heads_of(LAYOUT))
    layer.add(torch.zeros(40, HEADS, DIM), *torch.zeros(2, 40, KV_HEADS, DIM))
    worth = layer.cache.store.rated
    assert worth is not None
    mass, kept = worth.mass[0], layer.pages
    length = int(kept.lengths[0, 0])
    mass[0, :, 0, length : length + 4] = torch.tensor([5.0, 6.0, 7.0, 8.0])
    worth.straighten(0, kept, 0, torch.tensor([1, 3], dtype=torch.int32))
    assert mass[0, 0, 0, length : length + 2].tolist() == [6.0, 8.0]


def test_a_prompt_of_any_length_takes_what_is_kept_and_a_chunk() -> None:
    layouts = REAL["llama"]
    known = heads_of(*layouts, hidden=128)
    nbytes = [kv_nbytes("locret(keep=512)", layouts, context, 1, "bfloat16", known) for context in (4096, 131072)]
    assert nbytes[0] == nbytes[1]
    matrices = sum(2 * tensor.numel() for tensor in known.tensors["locret"].values())
    window = kv_nbytes("window(keep=512)", layouts, 4096, 1, "bfloat16")
    assert nbytes[0] - window == pytest.approx(matrices, rel=0.05)
    layer = Layer("locret(keep=64,recent=8,hidden=2)", LAYOUT, 1024, heads_of(LAYOUT))
    for _ in range(14):
        layer.add(torch.randn(64, HEADS, DIM), *torch.randn(2, 64, KV_HEADS, DIM))
        assert layer.length(0) <= 64
    layer.add(torch.randn(70, HEADS, DIM), *torch.randn(2, 70, KV_HEADS, DIM), decode=True)
    assert layer.length(0) < 64 + BLOCK


@pytest.mark.parametrize("window", [None, 12])
def test_tokens_are_worth_the_most_that_one_query_of_the_answer_gives_them(window: int | None) -> None:
    """Its score before the softmax, of any head of the group: neither the sum nor the mean, nor what others ask."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(40, HEADS, DIM, generator=generator)
    k, v = (torch.randn(40, KV_HEADS, DIM, generator=generator) for _ in range(2))
    x, worth = _example(Sample(q, k, v, None), LAYOUT, Scoring(0.5, window))
    assert torch.equal(x, torch.cat([part[:30].flatten(1) for part in (q, k, v)], 1))
    for head in range(KV_HEADS):
        for at in range(30):
            asking = range(30, 40) if window is None else range(30, min(40, at + window))
            asked = [float(q[i, head * GROUPS + g] @ k[at, head]) / 2 for i in asking for g in range(GROUPS)]
            assert float(worth[at, head]) == pytest.approx(max(asked, default=-math.inf), rel=1e-4, abs=1e-5)


def test_trained_heads_find_more_of_what_will_be_looked_at_than_untrained_ones(tiny: Callable[..., Tiny]) -> None:
    small, room = tiny("llama"), 1 << 34
    cache = Cache(cache_layouts(small.spec, 512, 64), 1, small.dtype, Arena(room), small.dtype, 64)
    engine = Engine(small.decoder, cache, Workspace(Arena(room)), 512, 64, 1)
    observed = Observing(engine, "tiny", small.tokens(3 * 512, seed=9), small.encode, room)
    seen: list[tuple[int, int]] = []
    findings = Locret(hidden=32).fit(observed, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    trained, untrained = (findings.report[name] for name in ("found", "found by untrained heads"))
    assert trained > untrained + 0.15  # of random tokens, whose keys are all that tells them apart
    assert Locret(hidden=32).check(findings.tensors, 3)
    assert not Locret(hidden=16).check(findings.tensors, 3)
    again = Locret(hidden=32, keep=100).fit(observed, lambda done, total: None)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in findings.tensors.items())


def test_what_was_found_is_read_in_its_own_type() -> None:
    method, known = Locret(hidden=2), heads_of(LAYOUT)
    tensors = {name: tensor.bfloat16() for name, tensor in known.of(method).items()}
    write_findings("0" * 32, method, Findings(tensors, {}, []))
    found = known_of("locret(keep=99,hidden=2)", "nothing", "0" * 32, [0])
    assert all(torch.equal(found.of(method)[name], tensor) for name, tensor in tensors.items())
    assert found.digest


def test_locret_says_what_it_is_not_for() -> None:
    with pytest.raises(UsageError, match="hidden units"):
        Locret(hidden=0)
    assert Locret().refusal(LayerLayout(1, 12, 8, 0, shared=True)) is not None
    assert Locret(hidden=8).fitted_by() == Locret(keep=9, hidden=8, recent=3).fitted_by()
