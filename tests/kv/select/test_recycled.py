"""What recycled is for; each of these tests fails with another selector in its place."""

from __future__ import annotations

import pytest
import torch
from tests.kv.driver import Layer
from tests.kv.test_methods import DIM, GROUPS, HEADS, KV_HEADS, LAYOUT, noise, unit

from tightfit.errors import UsageError
from tightfit.kernels.codec import PAGE
from tightfit.kv.compose import compose

PROMPT = 200


def most_attended(q: torch.Tensor, k: torch.Tensor, count: int) -> list[set[int]]:
    """Of each key-value head what a query ``q`` (heads, dim) gives most to of keys ``k`` (n, kv_heads, dim)."""
    found = []
    for head in range(KV_HEADS):
        scores = q[head * GROUPS : (head + 1) * GROUPS] @ k[:, head].T / DIM**0.5
        found.append(set(scores.softmax(-1).sum(0).topk(count).indices.tolist()))
    return found


def hide(layer: Layer, kept: list[set[int]]) -> None:
    """Makes the prompt's keys unreadable, but for those that each head may read."""
    for head, tokens in enumerate(kept):
        for token in set(range(PROMPT)) - tokens:
            page = int(layer.pages.table[0, head, token // PAGE])
            layer.pages.keys[0, page, token % PAGE] = torch.nan


def test_steps_between_full_ones_read_what_the_last_full_one_gave_most_to() -> None:
    """Those tokens and no other, whatever the queries between look for."""
    layer = Layer("recycled(tokens=32,full=0,stride=4)", LAYOUT)
    q, k, v = noise(PROMPT, scale=1.0)
    layer.add(q, k, v)
    asked, keys, values = noise(5, seed=1, scale=1.0)
    layer.add(*(x[:1] for x in (asked, keys, values)), decode=True)  # the first token after a prompt sees everything
    best = most_attended(asked[0], k, 32)
    hide(layer, best)
    for step in (1, 2, 3):
        out = layer.add(*(x[step : step + 1] for x in (asked, keys, values)), decode=True)
        for head in range(KV_HEADS):
            seen = sorted(best[head])
            every = torch.cat([k[seen, head], keys[: step + 1, head]])
            heads = slice(head * GROUPS, (head + 1) * GROUPS)
            weights = (asked[step, heads] @ every.T / DIM**0.5).softmax(-1)
            expected = weights @ torch.cat([v[seen, head], values[: step + 1, head]])
            torch.testing.assert_close(out[0, heads], expected, rtol=1e-4, atol=1e-4)
    full = layer.add(*(x[4:5] for x in (asked, keys, values)), decode=True)
    assert full.isnan().all()  # the next full step reads everything again


@pytest.mark.parametrize(("similar", "finds"), [(-1.0, False), (0.5, True)])
def test_a_query_of_another_kind_looks_at_everything_sooner(similar: float, finds: bool) -> None:
    layer = Layer(f"recycled(tokens=32,full=0,stride=100,similar={similar})", LAYOUT)
    q, k, v = noise(PROMPT)
    k[70] = 20 * unit(0)  # what only the third token looks for
    layer.add(q, k, v)
    for query in (unit(1), unit(1) + 0.3 * unit(2)):
        layer.add(query.expand(1, HEADS, DIM).contiguous() * 4, *noise(1)[1:], decode=True)
    if 70 in set.union(*most_attended((4 * unit(1)).expand(HEADS, DIM), k, 32)):
        pytest.fail("the needle is found by chance: choose others")
    out = layer.add((4 * unit(0)).expand(1, HEADS, DIM).contiguous(), *noise(1)[1:], decode=True)
    found = (out[0, :GROUPS] - v[70, 0]).abs().max() < 0.1 * v[70, 0].abs().max()
    assert bool(found) == finds


def test_what_was_chosen_is_forgotten_with_the_tokens_that_it_was_chosen_from() -> None:
    """Where an evictor lets tokens go, others stand in their places: the next step is a full one."""
    layer = Layer("h2o(keep=64)+recycled(tokens=32,full=0,stride=1000)", LAYOUT)
    q, k, v = noise(PROMPT, scale=1.0)
    layer.add(q, k, v)
    for token in range(200, 224):
        layer.add(*noise(1, seed=token, scale=1.0), decode=True)
    selecting = layer.cache.store.selecting[0]
    current = int(selecting.states.current[0])
    assert int(selecting.age[0, current]) > 1000
    layer.add(*noise(1, seed=9), decode=True)
    assert int(selecting.age[0, int(selecting.states.current[0])]) == 0


def test_settings_that_mean_nothing_are_refused() -> None:
    for kv in (
        "recycled(stride=0)",
        "recycled(similar=2)",
        "recycled(tokens=8)",
        "recycled+kvsharer",
        "recycled+window",
    ):
        with pytest.raises(UsageError, match="recycled"):
            compose(kv)
