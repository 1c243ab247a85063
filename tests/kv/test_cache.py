"""The cache takes exactly the bytes that it says, and keeps what queries will see."""

from __future__ import annotations

import pytest
import torch

from tightfit.budget.ledger import ALIGNMENT, Arena, Workspace
from tightfit.kernels.attention import Scoring, append, attend, attend_rows, rotate_append
from tightfit.kv.base import LayerLayout
from tightfit.kv.cache import Cache, window_slots
from tightfit.kv.make import kv_nbytes
from tightfit.model.batch import Batch, Segment

HEADS, DIM = 2, 4


def test_nbytes_is_what_an_arena_needs() -> None:
    layouts = [LayerLayout(2, 8, 6, 31), LayerLayout(1, 5, 5, 7), LayerLayout(1, 12, 9, 31, shared=True)]
    for name, itemsize in (("float32", 4), ("bfloat16", 2)):
        exact = 3 * itemsize * (2 * 31 * (8 + 6) + 7 * (5 + 5) + 31 * 12)
        promised = kv_nbytes("none", layouts, 31, 3, name)
        assert exact <= promised <= exact + 2 * ALIGNMENT * len(layouts)


def test_a_layer_with_a_window_keeps_the_window_and_a_chunk() -> None:
    assert window_slots(1000, None, 64) == 1000
    assert window_slots(1000, 128, 64) == 127 + 64  # the first query of a chunk sees 127 tokens before it
    assert window_slots(100, 128, 64) == 100


def places_of(sequence: int, start: int, stop: int) -> torch.Tensor:
    return torch.tensor([[sequence, position] for position in range(start, stop)], dtype=torch.int32)


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
        places, outs = places_of(0, start, stop), []
        for cache in (whole, ring):
            append(cache.layers[0], places, k[start:stop], v[start:stop])
            together, alone = torch.empty(2, stop - start, HEADS, DIM)
            attend(cache.layers[0], 0, start, q[start:stop], together, ws, Scoring(1.0, window))
            attend_rows(cache.layers[0], places, q[start:stop], alone, ws, Scoring(1.0, window))
            outs += [together, alone]
        for out in outs:
            torch.testing.assert_close(out, outs[0], rtol=0, atol=1e-6)  # the same numbers in another order


def test_sequences_and_layers_do_not_touch_each_other() -> None:
    torch.manual_seed(0)
    layouts = [LayerLayout(HEADS, DIM, DIM, 8)] * 2
    cache, ws = Cache(layouts, 2, torch.float32, Arena(1 << 20)), Workspace(Arena(1 << 20))
    cells = [(layer, sequence) for layer in range(2) for sequence in range(2)]
    values = {cell: torch.randn(1, HEADS, DIM) for cell in cells}
    for layer, sequence in cells:
        append(cache.layers[layer], places_of(sequence, 0, 1), torch.randn(1, HEADS, DIM), values[layer, sequence])
    for layer, sequence in cells:
        out = torch.empty(1, HEADS, DIM)
        attend_rows(cache.layers[layer], places_of(sequence, 0, 1), torch.randn(1, HEADS, DIM), out, ws, Scoring(1.0))
        torch.testing.assert_close(out, values[layer, sequence])  # one token: its own value


def test_keys_are_rotated_before_they_are_kept_and_queries_with_them() -> None:
    torch.manual_seed(0)
    cache = Cache([LayerLayout(HEADS, DIM, DIM, 8)], 1, torch.float32, Arena(1 << 20))
    q, k, v = torch.randn(2, 4, DIM), torch.randn(2, HEADS, DIM), torch.randn(2, HEADS, DIM)
    quarter = torch.zeros(2, DIM // 2), torch.ones(2, DIM // 2)  # cosine and sine of a quarter of a turn
    turned = [torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1) for x in (q, k)]
    rotate_append(cache.layers[0], places_of(0, 3, 5), q, k, v, *quarter, False, Workspace(Arena(1 << 20)))
    assert torch.equal(q, turned[0])
    assert torch.equal(cache.layers[0].keys[0, :, 3:5], turned[1].transpose(0, 1))
    assert torch.equal(cache.layers[0].values[0, :, 3:5], v.transpose(0, 1))


def test_only_prefill_multiplies_in_the_type_of_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decodes is exact, so that its bits do not depend on how many tokens are verified at once."""
    allowed = []
    monkeypatch.setattr("tightfit.kernels.attention.attend", lambda *args: allowed.append(args[-1]))
    q, ws = torch.zeros(2, HEADS, DIM), Workspace(Arena(1 << 20))
    for dtype in (torch.bfloat16, torch.float32):
        layouts = [LayerLayout(HEADS, DIM, DIM, 8)]
        cache = Cache(layouts, 1, torch.bfloat16, Arena(1 << 20), dtype)
        step = Batch((Segment(0, 0, [0, 0]),))
        cache.attend_step(0, step, None, q, q, ws, Scoring(1.0))
    assert allowed == [True, False]
