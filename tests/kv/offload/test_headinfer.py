"""Heads come from the file in turn: what is computed is what a cache in memory gives, and memory is for some heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kv.driver import Tiny
from tests.parity.harness import ROOM

from tightfit.budget.ledger import Arena
from tightfit.kernels import cpu
from tightfit.kernels.pages import PAGE
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.paged import PagedCache
from tightfit.model.batch import Segment

compiled = pytest.mark.skipif(not cpu.available(), reason="reading ahead is compiled")
HEADS = 3


@pytest.mark.parametrize("name", ["llama", "sliding", "latent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_a_cache_in_memory(tiny: Callable[..., Tiny], name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype)
    inside, outside = model.run("h2o(keep=512)"), model.run("headinfer(resident=0)")  # h2o keeps all
    first, same = (run.prefill(model.tokens(300)) for run in (inside, outside))
    assert torch.equal(first, same)
    expected, found = inside.generate(first, 40), outside.generate(same, 40)
    assert expected[0] == found[0]
    assert all(torch.equal(a, b) for a, b in zip(expected[1], found[1], strict=True))
    outside.cache.close()


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(140, 400), min_size=1, max_size=3), heads=st.integers(2, 9), drafts=st.booleans())
def test_sequences_of_any_length_share_the_heads_in_memory(
    tiny: Callable[..., Tiny], lengths: Sequence[int], heads: int, drafts: bool
) -> None:
    model = tiny("llama")
    runs = [
        model.run(kv, sequences=3, tail=4 if drafts else 1) for kv in ("h2o(keep=512)", f"headinfer(heads={heads})")
    ]
    for slot, length in enumerate(lengths):
        a, b = (run.prefill(model.tokens(length, slot), slot=slot) for run in runs)
        assert torch.equal(a, b)
    for _ in range(3):
        for run in runs:
            assert all(run.cache.room(slot) for slot in range(len(lengths)))
        count = min(min(runs[0].cache.room(slot) for slot in range(len(lengths))), 4 if drafts else 1)
        parents = [-1, 0, 0, 1][:count] if drafts else None
        logits = [
            run.step(
                *(
                    Segment(slot, run.lengths[slot], [7, 8, 9, 10][:count], decode=True, logits="all", parents=parents)
                    for slot in range(len(lengths))
                )
            )
            for run in runs
        ]
        assert torch.equal(*logits)
        for run in runs:
            for slot in range(len(lengths)):
                run.commit([0], slot)
    runs[1].cache.close()


def reserved(kv: str, layers: int, context: int) -> int:
    layouts, arena = [LayerLayout(4, 32, 32, context, heads=4)] * layers, Arena(ROOM)
    PagedCache(layouts, compose(kv), context, 1, torch.bfloat16, arena).close()
    return arena.used


@compiled
@pytest.mark.parametrize("layers", [2, 16])
def test_memory_for_a_context_is_that_of_some_heads_whatever_the_layers(layers: int) -> None:
    """A cache in memory grows by all heads of all layers."""
    more = reserved(f"headinfer(heads={HEADS})", layers, 8192) - reserved(f"headinfer(heads={HEADS})", layers, 4096)
    tables = layers * 4 * 4096 // PAGE * 4  # where pages lie: an int32 for each page of a head
    assert more == HEADS * 4096 * (32 + 32) * 2 + tables
    assert reserved("int8", layers, 8192) - reserved("int8", layers, 4096) > layers * 4 * 4096 * (32 + 32)


@compiled
def test_the_next_head_is_asked_for_before_one_is_looked_at(tiny: Callable[..., Tiny]) -> None:
    """Every head is on its way before it is wanted: what follows is read while one is computed."""
    model = tiny("llama")
    run = model.run("headinfer(resident=0)")
    logits = run.prefill(model.tokens(256))
    run.generate(logits, 20)
    layers, heads, steps = 3, 2, 256 // 64 - 2 + 20  # the first two chunks find nothing in the file
    assert run.paged.fetched.wanted == run.paged.fetched.ahead == layers * heads * steps
    run.cache.close()
    host = model.run("host(resident=0)")
    host.generate(host.prefill(model.tokens(256)), 2)
    assert host.paged.fetched == (0, 0, 0, 0)
    host.cache.close()


@compiled
def test_what_was_read_ahead_is_not_believed_after_pages_change(tiny: Callable[..., Tiny]) -> None:
    """A sequence that takes another's place, and tokens that are let go of, are read anew."""
    model = tiny("llama")
    for kv in ("{}headinfer(resident=0)", "h2o(keep=200,recent=0.25)+{}headinfer(resident=0)"):
        found = []
        for begun in (0, 1):
            run = model.run(kv.format("int8(recent=0)+"))
            for again in range(begun + 1):  # the second time after another sequence
                run.lengths[0] = 0
                logits = run.prefill(model.tokens(300, seed=1 - again + begun))
            found.append(run.generate(logits, 70))
            run.cache.close()
        assert found[0][0] == found[1][0]
        assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
