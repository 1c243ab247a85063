"""The cache takes exactly the bytes that it says, and keeps what queries will see."""

from __future__ import annotations

import pytest
import torch

from tightfit.budget.ledger import ALIGNMENT, Arena, Workspace
from tightfit.kv.cache import Cache, LayerLayout, window_slots

HEADS, DIM = 2, 4


def test_nbytes_is_what_an_arena_needs() -> None:
    layouts = [LayerLayout(2, 8, 6, 31), LayerLayout(1, 5, 5, 7), LayerLayout(1, 12, 9, 31, shared=True)]
    for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 2)):
        arena = Arena(1 << 20)
        Cache(layouts, 3, dtype, arena)
        exact = 3 * itemsize * (2 * 31 * (8 + 6) + 7 * (5 + 5) + 31 * 12)
        promised = Cache.nbytes(layouts, 3, itemsize)
        assert exact <= arena.used <= promised <= exact + 2 * ALIGNMENT * len(layouts)


def test_a_layer_with_a_window_keeps_the_window_and_a_chunk() -> None:
    assert window_slots(1000, None, 64) == 1000
    assert window_slots(1000, 128, 64) == 127 + 64  # the first query of a chunk sees 127 tokens before it
    assert window_slots(100, 128, 64) == 100


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_a_ring_attends_like_a_cache_that_keeps_everything(chunk: int) -> None:
    """Through five turns of the ring, in chunks that do and do not divide it."""
    torch.manual_seed(0)
    window, length = 9, 80
    k, v, q = (torch.randn(length, HEADS, DIM) for _ in range(3))
    whole = Cache([LayerLayout(HEADS, DIM, DIM, length)], 1, torch.float32, Arena(1 << 20))
    ring = Cache([LayerLayout(HEADS, DIM, DIM, window_slots(length, window, chunk))], 1, torch.float32, Arena(1 << 20))
    ws = Workspace(Arena(1 << 20))
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        outs = []
        for cache in (whole, ring):
            cache.append(0, 0, start, k[start:stop], v[start:stop])
            outs.append(torch.empty(stop - start, HEADS, DIM))
            cache.attend(0, 0, start, q[start:stop], outs[-1], ws, scale=1.0, window=window)
        torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-6)  # the same numbers in another order


def test_sequences_and_layers_do_not_touch_each_other() -> None:
    torch.manual_seed(0)
    layouts = [LayerLayout(HEADS, DIM, DIM, 8)] * 2
    cache, ws = Cache(layouts, 2, torch.float32, Arena(1 << 20)), Workspace(Arena(1 << 20))
    places = [(layer, sequence) for layer in range(2) for sequence in range(2)]
    values = {place: torch.randn(1, HEADS, DIM) for place in places}
    for place in places:
        cache.append(*place, 0, torch.randn(1, HEADS, DIM), values[place])
    for place in places:
        out = torch.empty(1, HEADS, DIM)
        cache.attend(*place, 0, torch.randn(1, HEADS, DIM), out, ws, scale=1.0)
        torch.testing.assert_close(out, values[place])  # one token: its own value


def test_only_prefill_multiplies_in_the_type_of_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decodes is exact, so that its bits do not depend on how many tokens are verified at once."""
    used = []
    monkeypatch.setattr("tightfit.kv.cache.attend", lambda *args, gemm_dtype, **kwargs: used.append(gemm_dtype))
    layouts = [LayerLayout(HEADS, DIM, DIM, 8)]
    cache = Cache(layouts, 1, torch.bfloat16, Arena(1 << 20), gemm_dtype=torch.bfloat16)
    q = torch.zeros(2, HEADS, DIM)
    for gemm in (True, False):
        cache.attend(0, 0, 0, q, q, Workspace(Arena(1 << 20)), scale=1.0, gemm=gemm)
    assert used == [torch.bfloat16, torch.float32]


def test_asking_for_more_than_is_kept_is_refused() -> None:
    cache = Cache([LayerLayout(HEADS, DIM, DIM, 10)], 1, torch.float32, Arena(1 << 20))
    q = torch.zeros(3, HEADS, DIM)
    with pytest.raises(ValueError, match="11 tokens in layer 0, which keeps 10"):
        cache.attend(0, 0, 8, q, q, Workspace(Arena(1 << 20)), scale=1.0)
    with pytest.raises(ValueError, match="11 tokens in layer 0, which keeps 10"):
        cache.attend(0, 0, 50, q, q, Workspace(Arena(1 << 20)), scale=1.0, window=9)
