"""The ring gives each unit whole to its user, in whatever order it is asked for, and reads ahead in between."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
import torch

from tightfit.weights.placement.ring import Piece, Ring

SIZES = [100, 37, 1, 64, 250, 90]  # bytes; unit 2 is read in one piece
AT_ONCE = 16


class Disk:
    """Unit u is full of u + 1. ``failing`` units raise; ``gate`` holds readers up while it is not set."""

    def __init__(self) -> None:
        self.failing: set[int] = set()
        self.read: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, unit: int, piece: Piece, out: torch.Tensor) -> None:
        self.gate.wait(10)
        assert len(out) == piece.stop - piece.start <= AT_ONCE
        self.read.append(unit)
        if unit in self.failing:
            raise OSError(f"unit {unit}")
        out.fill_(unit + 1)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count} buffers")
def ring(disk: Disk, request: pytest.FixtureRequest) -> Iterator[tuple[Ring, list[torch.Tensor]]]:
    buffers = [torch.zeros(max(SIZES), dtype=torch.uint8) for _ in range(request.param)]
    made = Ring(SIZES, buffers, disk, threads=3, at_once=AT_ONCE)
    yield made, buffers
    made.stop()
    assert not any(thread.is_alive() for thread in made._threads)


def check(ring: tuple[Ring, list[torch.Tensor]], unit: int) -> None:
    with ring[0].use(unit) as buffer:
        assert (ring[1][buffer][: SIZES[unit]] == unit + 1).all()


def test_units_come_whole_and_in_turn_again_and_again(ring: tuple[Ring, list[torch.Tensor]], disk: Disk) -> None:
    for _ in range(50):
        for unit in range(len(SIZES)):
            check(ring, unit)
    # Each unit was read once for each use, but for those that are read ahead at the end.
    assert 50 <= disk.read.count(2) <= 51


def test_units_come_whole_in_any_order(ring: tuple[Ring, list[torch.Tensor]]) -> None:
    rng = random.Random(0)
    for _ in range(300):
        check(ring, rng.randrange(len(SIZES)))


def test_the_next_units_are_read_while_one_is_used(disk: Disk) -> None:
    buffers = [torch.zeros(max(SIZES), dtype=torch.uint8) for _ in range(3)]
    ring = Ring(SIZES, buffers, disk, threads=2, at_once=AT_ONCE)
    try:
        with ring.use(0):
            for _ in range(1000):
                if sum(unit == 2 for unit in disk.read):
                    break
                threading.Event().wait(0.01)
            assert {1, 2} <= set(disk.read)
            assert 3 not in disk.read  # there is no buffer for it
    finally:
        ring.stop()


def test_units_that_are_left_out_are_not_read_and_come_again_when_they_are_wanted(
    ring: tuple[Ring, list[torch.Tensor]], disk: Disk
) -> None:
    ring[0].go_round(4)
    for _ in range(20):
        for unit in range(4):
            check(ring, unit)
    ring[0].go_round(len(SIZES))
    assert set(disk.read) == {0, 1, 2, 3}
    for _ in range(20):
        for unit in range(len(SIZES)):
            check(ring, unit)
    # Nothing was given up: of no unit more was read than its uses, and what is ahead of the last one.
    assert disk.read.count(2) <= 41


def test_an_error_reaches_the_user_of_its_unit_and_the_next_use_tries_again(
    ring: tuple[Ring, list[torch.Tensor]], disk: Disk
) -> None:
    disk.failing = {3}
    for unit in range(3):
        check(ring, unit)
    for _ in range(3):
        with pytest.raises(OSError, match="unit 3"):
            check(ring, 3)
    disk.failing = set()
    for unit in (3, 4, 5, 0):
        check(ring, unit)


def test_an_error_of_the_user_leaves_the_ring_whole(ring: tuple[Ring, list[torch.Tensor]]) -> None:
    for _ in range(10):
        with pytest.raises(KeyboardInterrupt), ring[0].use(0):
            raise KeyboardInterrupt
        check(ring, 1)


def test_it_stops_while_readers_wait_for_the_disk(disk: Disk) -> None:
    disk.gate.clear()
    ring = Ring(SIZES, [torch.zeros(max(SIZES), dtype=torch.uint8)], disk, threads=2, at_once=AT_ONCE)
    user = threading.Thread(target=lambda: ring.use(0).__enter__(), daemon=True)
    user.start()
    threading.Timer(0.1, disk.gate.set).start()
    user.join(10)
    ring.stop()
    assert not any(thread.is_alive() for thread in ring._threads)
