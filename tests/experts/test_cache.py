"""The cache gives each expert whole to its user, keeps what its ranking says is worth most, and reads ahead."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from tightfit.experts.cache import ExpertCache, Key
from tightfit.experts.lru import Lru
from tightfit.weights.placement.readers import Piece, pieces

LAYERS, EXPERTS = 3, 8
SIZES = [100, 37, 64]  # of an expert of each layer
SCORES = torch.full((1, EXPERTS), 1 / EXPERTS, dtype=torch.float64)


class Disk:
    """Every byte of expert e of layer l is 16 l + e + 1. ``failing`` ones raise; ``gate`` holds readers up while it is
    not set."""

    def __init__(self) -> None:
        self.failing: set[Key] = set()
        self.read: list[Key] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, key: Key, piece: Piece, out: torch.Tensor) -> None:
        self.gate.wait(10)
        if piece.start == 0:
            self.read.append(key)
        if key in self.failing:
            raise OSError(f"expert {key}")
        out.fill_(16 * key[0] + key[1] + 1)


class Cached:
    def __init__(self, slots: int) -> None:
        self.disk = Disk()
        self.buffers = [torch.zeros(max(SIZES), dtype=torch.uint8) for _ in range(slots)]
        ranking = Lru().ranking(LAYERS, EXPERTS, 2, None)
        self.cache = ExpertCache(self.buffers, [pieces(size, 16) for size in SIZES], self.disk, ranking, threads=3)

    def step(self, layer: int, *experts: int) -> None:
        """Wants and uses experts."""
        self.cache.want(layer, experts, SCORES)
        for expert in experts:
            with self.cache.use((layer, expert)) as slot:
                assert (self.buffers[slot][: SIZES[layer]] == 16 * layer + expert + 1).all()

    def settle(self) -> None:
        """Waits until everything is read that is expected."""
        with self.cache._changed:
            assert self.cache._changed.wait_for(lambda: not (self.cache._reading or self.cache._expected), 10)


@pytest.fixture
def make() -> Iterator[type[Cached]]:
    made: list[Cached] = []

    class Kept(Cached):
        def __init__(self, slots: int) -> None:
            super().__init__(slots)
            made.append(self)

    yield Kept
    for cached in made:
        cached.disk.gate.set()
        cached.cache.stop()
        assert not any(thread.is_alive() for thread in cached.cache._threads)


@pytest.mark.parametrize("slots", [1, 2, 5, 24])
def test_every_expert_comes_whole_whatever_the_order(make: type[Cached], slots: int) -> None:
    cached, dice = make(slots), random.Random(slots)
    for _ in range(200):
        layer = dice.randrange(LAYERS)
        if dice.random() < 0.5:
            cached.cache.expect((layer + 1) % LAYERS, dice.sample(range(EXPERTS), 2))
        cached.step(layer, *sorted(dice.sample(range(EXPERTS), dice.randint(1, EXPERTS))))
    counts = cached.cache.counts
    assert counts["hits"] <= counts["used"]
    assert counts["read"] == sum(SIZES[layer] for layer, _ in cached.disk.read)


def test_what_is_there_is_not_read_again(make: type[Cached]) -> None:
    cached = make(4)
    for _ in range(5):
        cached.step(0, 1, 2)
        cached.step(1, 1, 2)
    assert sorted(cached.disk.read) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert cached.cache.counts["hits"] == 16
    assert cached.cache.counts["used"] == 20


def test_the_one_that_is_worth_least_goes(make: type[Cached]) -> None:
    cached = make(3)
    for expert in (0, 1, 2, 0, 3):  # 1 was used before all others that are there
        cached.step(0, expert)
    assert {key[1] for key in cached.cache._held} == {0, 2, 3}


def test_what_a_step_still_wants_does_not_go_for_what_it_wants_first(make: type[Cached]) -> None:
    cached = make(2)
    cached.step(0, 6, 7)
    cached.disk.read.clear()
    cached.step(0, 1, 7)  # 7 was not used for longer than 6 by any count of steps, and yet 6 must go
    assert cached.disk.read == [(0, 1)]


def test_expected_experts_are_read_before_their_turn(make: type[Cached]) -> None:
    cached = make(6)
    cached.step(0, 0)
    cached.cache.expect(1, [3, 5])
    cached.settle()
    cached.disk.gate.clear()  # nothing more can be read
    cached.step(1, 3, 5)
    assert cached.cache.counts["hits"] == 2
    assert cached.cache.counts["foreseen"] == 2


def test_an_expert_on_its_way_is_waited_for_and_counted_as_late(make: type[Cached]) -> None:
    cached = make(6)
    cached.step(0, 0)
    cached.disk.gate.clear()
    cached.cache.expect(1, [3])
    deadline = time.monotonic() + 10
    while (1, 3) not in cached.cache._held:
        assert time.monotonic() < deadline
    threading.Timer(0.05, cached.disk.gate.set).start()
    cached.step(1, 3)
    assert cached.cache.counts["late"] == 1
    assert cached.disk.read.count((1, 3)) == 1


def test_what_is_wanted_takes_the_room_of_what_is_only_expected(make: type[Cached]) -> None:
    cached = make(2)
    cached.step(0, 0)
    cached.cache.expect(1, [3, 4])
    cached.settle()
    cached.step(0, 1, 2)  # as if the model had gone another way
    assert set(cached.cache._held) == {(0, 1), (0, 2)}


def test_guesses_that_were_wrong_go_first(make: type[Cached]) -> None:
    cached = make(3)
    cached.step(1, 0)
    cached.cache.expect(2, [6])
    cached.settle()
    cached.step(2, 1)
    cached.step(0, 1)
    assert set(cached.cache._held) == {(1, 0), (2, 1), (0, 1)}


def test_an_error_reaches_the_user_of_its_expert_and_the_next_use_tries_again(make: type[Cached]) -> None:
    cached = make(3)
    cached.disk.failing.add((0, 2))
    with pytest.raises(OSError, match="expert"):
        cached.step(0, 1, 2, 3)
    cached.disk.failing.clear()
    cached.step(0, 1, 2, 3)


def test_an_error_of_a_guess_reaches_nobody_unless_it_is_wanted(make: type[Cached]) -> None:
    cached = make(4)
    cached.step(0, 0)
    cached.disk.failing.add((1, 2))
    cached.cache.expect(1, [2, 3])
    cached.settle()
    cached.step(1, 3)
    cached.disk.failing.clear()
    cached.step(1, 2)
    assert cached.disk.read.count((1, 2)) == 2


def test_it_can_be_filled_before_the_first_step(make: type[Cached]) -> None:
    cached = make(4)
    assert list(cached.cache.fill([(0, 1), (2, 5)])) == [SIZES[0], SIZES[2]]
    cached.disk.gate.clear()
    cached.step(2, 5)
    cached.step(0, 1)
