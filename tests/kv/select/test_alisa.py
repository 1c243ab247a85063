"""What alisa is for; each of these tests fails with another selector in its place."""

from __future__ import annotations

import pytest
import torch
from tests.kv.driver import Layer
from tests.kv.test_methods import DIM, GROUPS, KV_HEADS, LAYOUT, noise

from tightfit.errors import UsageError
from tightfit.kernels.codec import PAGE
from tightfit.kv.compose import compose
from tightfit.kv.select.by_last_queries import ByLastQueries

PROMPT = 200


def selecting(layer: Layer) -> ByLastQueries:
    found = layer.cache.store.selecting[0]
    assert isinstance(found, ByLastQueries)
    return found


def important(queries: torch.Tensor, k: torch.Tensor, count: int) -> list[set[int]]:
    """Of each head the tokens of ``k`` (n, kv_heads, dim) to which ``queries`` (m, heads, dim) give most, together."""
    found = []
    for head in range(KV_HEADS):
        scores = queries[:, head * GROUPS : (head + 1) * GROUPS] @ k[:, head].T / DIM**0.5
        found.append(set(scores.softmax(-1).sum((0, 1)).topk(count).indices.tolist()))
    return found


def test_what_is_chosen_holds_for_thirty_two_tokens() -> None:
    layer = Layer("alisa(tokens=64,full=0,local=0.5,steps=4)", LAYOUT)
    q, k, v = noise(PROMPT, scale=1.0)
    layer.add(q, k, v)
    asked, keys, values = noise(60, seed=1, scale=1.0)
    every = torch.cat([k, keys])
    state, seen = selecting(layer), []
    for step in range(60):
        layer.add(*(x[step : step + 1] for x in (asked, keys, values)), decode=True)
        current = int(state.states.current[0])
        seen.append([set(of_head.tolist()) for of_head in state.listed[0, current]])
    assert seen[0] == important(asked[:1], every[: PROMPT - 32], 32)
    assert seen[24] == important(asked[21:25], every[: PROMPT + 24 - 32], 32)
    assert seen[56] == important(asked[53:57], every[: PROMPT + 56 - 32], 32)
    assert seen[:24] == seen[:1] * 24
    assert seen[24:56] == seen[24:25] * 32


def test_tokens_that_are_neither_local_nor_important_are_not_read() -> None:
    layer = Layer("alisa(tokens=64,full=0,local=0.5,steps=4)", LAYOUT)
    q, k, v = noise(PROMPT, scale=1.0)
    layer.add(q, k, v)
    asked, keys, values = noise(3, seed=1, scale=1.0)
    layer.add(*(x[:1] for x in (asked, keys, values)), decode=True)
    kept = important(asked[:1], k[: PROMPT - 32], 32)
    for head, tokens in enumerate(kept):
        for token in set(range(PROMPT - 32)) - tokens:
            page = int(layer.pages.table[0, head, token // PAGE])
            layer.pages.keys[0, page, token % PAGE] = torch.nan
    for step in (1, 2):
        out = layer.add(*(x[step : step + 1] for x in (asked, keys, values)), decode=True)
        assert out.isfinite().all()
        for head, tokens in enumerate(kept):
            read = torch.tensor([*sorted(tokens), *range(PROMPT - 32, PROMPT)])
            every = torch.cat([k[read, head], keys[: step + 1, head]])
            heads = slice(head * GROUPS, (head + 1) * GROUPS)
            weights = (asked[step, heads] @ every.T / DIM**0.5).softmax(-1)
            expected = weights @ torch.cat([v[read, head], values[: step + 1, head]])
            torch.testing.assert_close(out[0, heads], expected, rtol=1e-4, atol=1e-4)


def test_settings_that_mean_nothing_are_refused() -> None:
    for kv in ("alisa(local=1)", "alisa(steps=0)", "alisa(tokens=8)", "alisa+kvsharer"):
        with pytest.raises(UsageError, match="alisa"):
            compose(kv)
