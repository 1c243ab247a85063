"""The ledger's promises: nothing is promised twice, arenas cost nothing before they are written, scratch is a stack."""

from __future__ import annotations

import pytest
import torch

from tightfit.budget.ledger import ALIGNMENT, KEPT_VIEWS, PAGE, Arena, Ledger, Workspace
from tightfit.budget.meter import resident_set
from tightfit.errors import BudgetError

MIB = 1 << 20


def test_a_reservation_beyond_the_budget_is_refused_and_changes_nothing() -> None:
    ledger = Ledger(100 * MIB)
    ledger.reserve("weights", 60 * MIB)
    with pytest.raises(BudgetError) as refused:
        ledger.reserve("kv", 50 * MIB)
    assert refused.value.smallest_bytes == 110 * MIB
    assert ledger.free == 40 * MIB
    ledger.reserve("kv", 40 * MIB)
    assert ledger.free == 0


def test_a_refused_arena_maps_nothing() -> None:
    ledger = Ledger(1 * MIB)
    with pytest.raises(BudgetError):
        ledger.arena("kv", 2 * MIB)
    assert ledger.receipt() == {}


def test_an_arena_is_resident_only_where_it_was_written() -> None:
    before = resident_set().current
    arena = Arena(256 * MIB)
    data = arena.take(256 * MIB)
    assert resident_set().current - before < 4 * MIB
    data[: 64 * MIB] = 1
    assert arena.resident() == 64 * MIB
    assert 60 * MIB < resident_set().current - before < 72 * MIB


def test_reading_unwritten_memory_gives_zeros_and_takes_none() -> None:
    arena = Arena(64 * MIB)
    before = resident_set().current
    assert int(arena.take(64 * MIB).sum()) == 0
    assert resident_set().current - before < 8 * MIB


def test_a_released_arena_gives_its_pages_back_and_keeps_its_views() -> None:
    arena = Arena(16 * MIB)
    data = arena.take(16 * MIB)
    data.fill_(7)
    arena.release()
    assert arena.resident() == 0
    assert int(data.max()) == 0


def test_an_arena_hands_out_aligned_pieces_and_is_never_grown() -> None:
    arena = Arena(PAGE)
    first, second = arena.take(10), arena.take(10)
    assert (second.data_ptr() - first.data_ptr()) % ALIGNMENT == 0
    with pytest.raises(BudgetError, match="no room"):
        arena.take(PAGE)


def test_the_workspace_is_a_stack_whose_high_water_mark_stays() -> None:
    ws = Workspace(Arena(1 * MIB))
    with ws.frame():
        ws.empty(1000)
        with ws.frame():
            inner = ws.empty(3, 5, dtype=torch.bfloat16)
            assert inner.shape == (3, 5)
        again = ws.empty(15, dtype=torch.bfloat16)
        assert again.data_ptr() == inner.data_ptr()  # the inner frame gave its place back
    assert ws.top == 0
    assert ws.high_water == 4032 + 30  # 1000 floats, rounded up to a cache line, and 15 of two bytes


def test_a_workspace_gives_the_same_tensor_for_the_same_place_again() -> None:
    ws = Workspace(Arena(1 * MIB))
    with ws.frame():
        first, (whole, a, b) = ws.empty(3, 5), ws.columns(2, (4,), (2, 3))
    with ws.frame():
        again, (same, _, _) = ws.empty(3, 5), ws.columns(2, (4,), (2, 3))
        assert again is first
        assert same is whole
        assert ws.empty(3, 5) is not first
    assert whole.shape == (2, 10)
    assert a.shape == (2, 4)
    assert b.shape == (2, 2, 3)
    whole.copy_(torch.arange(20.0).view(2, 10))
    assert a[1].tolist() == [10, 11, 12, 13]
    assert b[0, 1].tolist() == [7, 8, 9]


def test_a_tensor_of_inference_mode_is_not_given_outside_of_it() -> None:
    ws = Workspace(Arena(1 * MIB))
    with torch.inference_mode(), ws.frame():
        inside = ws.empty(4)
    with ws.frame():
        outside = ws.empty(4)
    assert inside.is_inference()
    assert not outside.is_inference()


def test_a_workspace_keeps_a_bounded_number_of_tensors() -> None:
    ws = Workspace(Arena(1 * MIB))
    for size in range(3 * KEPT_VIEWS):
        with ws.frame():
            ws.empty(size)
    assert len(ws._kept) <= KEPT_VIEWS


def test_a_workspace_that_is_too_small_says_so() -> None:
    ws = Workspace(Arena(PAGE))
    with pytest.raises(BudgetError, match="too small"):
        ws.empty(PAGE)


def test_the_receipt_gives_runtime_what_is_in_no_arena() -> None:
    ledger = Ledger(1024 * MIB)
    ledger.reserve("runtime", 300 * MIB)
    ledger.arena("kv", 32 * MIB).take(8 * MIB).fill_(1)
    ledger.measure(200 * MIB)
    assert ledger.receipt() == {
        "runtime": {"reserved_bytes": 300 * MIB, "peak_bytes": 192 * MIB},
        "kv": {"reserved_bytes": 32 * MIB, "peak_bytes": 8 * MIB},
    }
    ledger.measure(250 * MIB)
    ledger.measure(220 * MIB)
    assert ledger.receipt()["runtime"]["peak_bytes"] == 242 * MIB  # the largest is kept


def test_large_pages_change_nothing_but_their_size() -> None:
    arena = Arena(64 << 20)
    arena.use_large_pages()
    data = arena.take(40 << 20)
    assert arena.resident() == 0
    data.fill_(3)
    assert 40 << 20 <= arena.resident() <= 44 << 20  # a page that is begun is resident whole
    assert int(data.sum()) == 3 * (40 << 20)
    arena.release()
    assert arena.resident() == 0
