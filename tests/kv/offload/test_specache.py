"""A copy in few bits chooses the pages that are fetched; reading ahead changes when they come, never what is seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kv.driver import Layer, Run, Tiny

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import cpu, pages
from tightfit.kernels.pages import PAGE, Rows
from tightfit.kv.base import LayerLayout
from tightfit.kv.offload.speculating import Speculating

compiled = pytest.mark.skipif(not cpu.available(), reason="reading ahead is compiled")
LAYOUT = LayerLayout(2, 32, 16, 0, heads=4)
SPEC = "specache(tokens=64,ahead={},resident=0,bits={})"


def random_tokens(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(count, LAYOUT.heads, LAYOUT.key_dim, generator=generator)
    return q, *(torch.randn(count, LAYOUT.kv_heads, dim, generator=generator) for dim in (32, 16))


def codes(x: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """Numbers (PAGE, groups, n) as few bits give them back."""
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    scale, low = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


@settings(max_examples=20, deadline=None)
@given(length=st.integers(130, 420), bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 99))
def test_the_copy_chooses_and_gives_all_that_was_not_chosen(length: int, bits: int, seed: int) -> None:
    """The pages with the largest scores of keys in few bits are seen as they are, the others as the copy has them; a
    choice by the keys as they are, by bounds (quest), or seeing what was chosen alone gives something else."""
    layer = Layer(SPEC.format(64, bits), LAYOUT)
    q, k, v = random_tokens(length + 1, seed)
    layer.add(q[:-1], k[:-1], v[:-1])
    found = layer.add(q[-1:], k[-1:], v[-1:], decode=True)[0]
    whole = length // PAGE
    for head in range(LAYOUT.heads):
        keys, values = k[:, head // 2], v[:, head // 2]
        low_keys = codes(keys[: whole * PAGE].view(whole, PAGE, 32), bits, 1).flatten(0, 1)
        low_values = codes(values[: whole * PAGE], bits, 1)
        group = q[-1, head // 2 * 2 : head // 2 * 2 + 2]
        best = (group @ low_keys.T).view(2, whole, PAGE).amax((0, 2)).topk(min(2, whole)).indices
        near = (group @ low_keys.T).view(2, whole, PAGE).amax((0, 2)).sort(descending=True).values
        if whole > 2 and float(near[1] - near[2]) < 1e-3:  # either may be chosen
            continue
        as_they_are = torch.zeros(length + 1, dtype=torch.bool)
        as_they_are[whole * PAGE :] = True
        as_they_are.view(-1)[: whole * PAGE].view(whole, PAGE)[best] = True
        mixed_keys, mixed_values = keys.clone(), values.clone()
        few = ~as_they_are[: whole * PAGE]
        mixed_keys[: whole * PAGE][few], mixed_values[: whole * PAGE][few] = low_keys[few], low_values[few]
        weights = (q[-1, head] @ mixed_keys.T * 32**-0.5).softmax(0)
        torch.testing.assert_close(found[head], weights @ mixed_values, rtol=0, atol=2e-3)
    layer.cache.close()


@compiled
def test_only_chosen_pages_are_read_when_a_token_decodes(tiny: Callable[..., Tiny]) -> None:
    """A page of each head of each layer at most beside those that are there, of the nine in the file; with `host` it is
    all of them."""
    model, run = tiny("llama"), None
    for ahead in (0, 64):
        run = model.run(SPEC.format(ahead, 2).replace("tokens=64", "tokens=32"))
        logits = run.prefill(model.tokens(300))
        assert run.paged.fetched == (0, 0, 0, 0)  # prompts read as they go
        before = run.paged.fetched
        for _ in range(10):
            logits = run.generate(logits, 1)[1][0]
            now = run.paged.fetched
            page = pages.head_bytes(run.paged.layers[0]) // run.paged.layers[0].table.shape[2]
            assert now.wanted - before.wanted <= 3 * 2  # layers, heads
            assert now.bytes - before.bytes <= 3 * 2 * (1 + ahead // PAGE) * page
            if ahead == 0:
                assert now.bytes - before.bytes == (now.wanted - now.ahead - before.wanted + before.ahead) * page
            before = now
        run.cache.close()


def decoded(run: Run, tokens: list[int]) -> list[torch.Tensor]:
    return [run.decode(token) for token in tokens]


@compiled
def test_what_was_read_ahead_is_there_and_changes_nothing(tiny: Callable[..., Tiny]) -> None:
    """More of what is wanted is found when more is read ahead, and bits are the same; without reading ahead, found is
    only what an earlier token wanted."""
    model, found, logits = tiny("llama"), [], []
    tokens = model.tokens(40, seed=8)
    for ahead in (0, 64, 160):
        run = model.run(SPEC.format(ahead, 2))
        run.prefill(model.tokens(300))
        logits.append(decoded(run, tokens))
        wanted, there, *_ = run.paged.fetched
        found.append(there / wanted)
        run.cache.close()
    assert found[0] < found[1] < found[2]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*logits, strict=True))


@compiled
def test_drafts_that_are_refused_change_no_later_token(tiny: Callable[..., Tiny]) -> None:
    model = tiny("llama")
    plain, drafting = (model.run(SPEC.format(64, 2), tail=tail) for tail in (1, 6))
    for run in (plain, drafting):
        run.prefill(model.tokens(300))
    for token in model.tokens(40, seed=8):
        if drafting.paged.room(0) >= 4:
            drafting.verify([token, 5, 6, 7], [-1, 0, 0, 1])
            drafting.commit([])
        assert torch.equal(plain.decode(token), drafting.decode(token))
    for run in (plain, drafting):
        run.cache.close()


@pytest.mark.parametrize("level", cpu.supported()[:-1])
def test_pages_are_ranked_as_the_reference_does(level: str) -> None:
    layer = Layer(SPEC.format(64, 4), LAYOUT)
    layer.add(*random_tokens(300, 3))
    selecting = layer.cache.store.selecting[0]
    assert isinstance(selecting, Speculating)
    q, ws, found = random_tokens(3, 4)[0], Workspace(Arena(1 << 20)), []
    chosen, before = cpu.features()["chosen"], torch.tensor([[0, 300]] * 3, dtype=torch.int32)
    try:
        for used in (level, cpu.supported()[-1]):
            cpu.use(used)
            lists = [torch.empty(3, 2, width, dtype=torch.int32) for width in (2, 3, selecting.pages.table.shape[2])]
            pages.rank(selecting.low.pages, Rows(before), q, *lists, ws)
            found.append(lists)
    finally:
        cpu.use(chosen)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    best, following, others = found[0]
    for row in range(3):
        for head in range(2):
            assert sorted([*best[row, head].tolist(), *(x for x in others[row, head].tolist() if x >= 0)]) == list(
                range(9)
            )
            assert set(following[row, head].tolist()) <= set(others[row, head].tolist())
    layer.cache.close()
