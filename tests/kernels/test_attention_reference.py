"""The references: attention as a fold over blocks is the softmax written out, whatever a cache keeps in which order."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import attention_reference, ops
from tightfit.kernels.attention_reference import Slots, attend
from tightfit.kv.cache import window_slots

KV_HEADS, GROUPS, KEY_DIM, VALUE_DIM = 2, 3, 8, 6


def plain(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The definition, in float64, over keys (kv_heads, positions, dim) of all positions."""
    q, keys, values = q.double(), keys.double(), values.double()
    keys, values = keys.repeat_interleave(GROUPS, 0), values.repeat_interleave(GROUPS, 0)
    scores = torch.einsum("nhd,hpd->hnp", q, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    queries = torch.arange(start, start + q.shape[0]).unsqueeze(1)
    positions = torch.arange(keys.shape[1])
    hidden = positions > queries
    if window is not None:
        hidden |= positions <= queries - window
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        column = sinks.double().view(-1, 1, 1).expand(-1, q.shape[0], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    return torch.einsum("hnp,hpd->nhd", weights, values)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 keys, and 5 queries at once: tests of a hundred tokens then fold many."""
    monkeypatch.setattr(attention_reference, "KEY_BLOCK", 16)
    monkeypatch.setattr(attention_reference, "SCORE_BYTES", 5 * KV_HEADS * GROUPS * 16 * 4)


@pytest.mark.parametrize("window", [None, 1, 7, 16, 40])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("start", "n"), [(0, 1), (0, 33), (70, 1), (64, 30), (90, 7)])
def test_fold_equals_softmax(window: int | None, softcap: float | None, with_sinks: bool, start: int, n: int) -> None:
    torch.manual_seed(0)
    stop = start + n
    q = torch.randn(n, KV_HEADS * GROUPS, KEY_DIM)
    keys, values = torch.randn(KV_HEADS, stop, KEY_DIM), torch.randn(KV_HEADS, stop, VALUE_DIM)
    sinks = torch.randn(KV_HEADS * GROUPS) if with_sinks else None
    # A ring that is just large enough, its tokens where the cache would have written them.
    size = stop if window is None else min(stop, window - 1 + n)
    kept = torch.arange(stop - size, stop)
    ring_keys, ring_values = torch.empty(KV_HEADS, size, KEY_DIM), torch.empty(KV_HEADS, size, VALUE_DIM)
    ring_keys[:, kept % size], ring_values[:, kept % size] = keys[:, kept], values[:, kept]

    out = torch.empty(n, KV_HEADS * GROUPS, VALUE_DIM)
    ws = Workspace(Arena(1 << 20))
    attend(q, ring_keys, ring_values, start, out, ws, 0.7, window, softcap, sinks)
    expected = plain(q, keys, values, start, 0.7, window, softcap, sinks)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)  # float32 against float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_caches_are_folded_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, KV_HEADS * GROUPS, KEY_DIM)
    keys, values = torch.randn(KV_HEADS, 50, KEY_DIM).to(dtype), torch.randn(KV_HEADS, 50, VALUE_DIM).to(dtype)
    out = torch.empty(3, KV_HEADS * GROUPS, VALUE_DIM)
    attend(q, keys, values, 47, out, Workspace(Arena(1 << 20)), 0.7)
    torch.testing.assert_close(out.double(), plain(q, keys, values, 47, 0.7, None, None, None), rtol=0, atol=1e-5)


def test_values_may_be_the_first_features_of_the_keys() -> None:
    torch.manual_seed(0)
    q = torch.randn(3, KV_HEADS * GROUPS, KEY_DIM)
    for dtype in (torch.float32, torch.bfloat16):
        keys = torch.randn(KV_HEADS, 50, KEY_DIM).to(dtype)
        values = keys[..., :VALUE_DIM]
        out = torch.empty(3, KV_HEADS * GROUPS, VALUE_DIM)
        attend(q, keys, values, 47, out, Workspace(Arena(1 << 20)), 0.7)
        torch.testing.assert_close(out.double(), plain(q, keys, values, 47, 0.7, None, None, None), rtol=0, atol=1e-5)


def test_scores_far_apart_do_not_overflow() -> None:
    """Scores of several hundred, as attention sinks have: weights are 0 or 1, never NaN."""
    q = torch.full((40, KV_HEADS * GROUPS, KEY_DIM), 10.0)
    keys = torch.linspace(-10, 10, 40).view(1, 40, 1).expand(KV_HEADS, 40, KEY_DIM).contiguous()
    values = torch.randn(KV_HEADS, 40, VALUE_DIM)
    out = torch.empty(40, KV_HEADS * GROUPS, VALUE_DIM)
    attend(q, keys, values, 0, out, Workspace(Arena(1 << 20)), 1.0)
    torch.testing.assert_close(out, values.transpose(0, 1).repeat_interleave(GROUPS, 1), rtol=0, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    context=st.integers(1, 70),
    chunk=st.integers(1, 40),
    window=st.one_of(st.none(), st.integers(1, 60)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_a_dry_run_at_the_end_of_the_context_foresees_the_scratch_of_every_step(
    context: int, chunk: int, window: int | None, dtype: torch.dtype, data: st.DataObject
) -> None:
    chunk = min(chunk, context)
    start = data.draw(st.integers(0, context - 1))
    n = data.draw(st.integers(1, min(chunk, context - start)))
    keys = torch.zeros(KV_HEADS, window_slots(context, window, chunk), KEY_DIM, dtype=dtype)

    def scratch(start: int, n: int) -> int:
        q, ws = torch.zeros(n, KV_HEADS * GROUPS, KEY_DIM), Workspace(Arena(1 << 20))
        attend(q, keys, keys, start, q, ws, 1.0, window)
        return ws.high_water

    with ops.dry():
        foreseen = scratch(context - chunk, chunk)
    assert scratch(start, n) <= foreseen


def test_scratch_does_not_grow_with_the_context() -> None:
    used = []
    for length in (64, 512):
        ws = Workspace(Arena(1 << 20))
        keys = torch.randn(KV_HEADS, length, KEY_DIM, dtype=torch.bfloat16)
        q, out = torch.randn(20, KV_HEADS * GROUPS, KEY_DIM), torch.empty(20, KV_HEADS * GROUPS, KEY_DIM)
        attend(q, keys, keys, length - 20, out, ws, 1.0)
        used.append(ws.high_water)
    assert used[0] == used[1]


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 60), size=st.integers(1, 20), data=st.data())
def test_slots_know_the_positions_that_they_hold(length: int, size: int, data: st.DataObject) -> None:
    ring = [-1] * size
    for position in range(length):
        ring[position % size] = position
    slots = Slots(length, size)
    assert slots.used == sum(position >= 0 for position in ring)
    start = data.draw(st.integers(0, slots.used - 1))
    stop = data.draw(st.integers(start + 1, slots.used))
    held = ring[start:stop]
    assert slots.positions(start, stop).tolist() == held
    assert slots.span(start, stop) == (min(held), max(held))
