"""The solver finds what trying everything finds, and nothing simpler is better."""

from __future__ import annotations

import random
from itertools import product

import pytest

from tightfit.errors import TightfitError
from tightfit.plan.program import Aim, Answer, Choice, Table, solve
from tightfit.plan.solve import GAP

BITS = (16.0, 8.5, 6.5, 4.5)
NATS = (0.0, 0.0005, 0.0025, 0.04)
SIZE = 64 << 20


def table(rng: random.Random, groups: int, fixed: int = 0, streams: bool = False, slower: float = 1.0) -> Table:
    """Layers of a model, and a cache at the end."""

    def layer() -> tuple[Choice, ...]:
        size, share = SIZE * rng.randint(1, 3), rng.lognormvariate(0, 1)
        return tuple(
            Choice(
                int(size * bits / 16),
                share * nats,
                slower * (0.2 - bits / 200),
                bits / 50,
                size if streams and bits == 16 else 0,
            )
            for bits, nats in zip(BITS, NATS, strict=True)
        )

    cache = (Choice(SIZE, 0.0, 0.1, 0.3), Choice(SIZE // 3, 0.002, 0.15, 0.2))
    kinds = [layer() for _ in range(groups - 1)]
    return Table((*kinds, kinds[0], cache), fixed, 0.05, 0.1, 4e-9, 2.5e-8, 3 * SIZE * 3, 1 << 20)


def tried(table: Table, aim: Aim) -> float:
    """The least sum of all answers in memory."""
    best = float("inf")
    for chosen in product(*table.groups):
        nbytes = table.nbytes + sum(choice.nbytes for choice in chosen)
        nats = sum(choice.nats for choice in chosen)
        seconds = table.prefill + table.decode + sum(choice.prefill + choice.decode for choice in chosen)
        within = (
            (aim.most_bytes is None or nbytes <= aim.most_bytes)
            and (aim.most_nats is None or nats <= aim.most_nats)
            and (aim.most_seconds is None or seconds <= aim.most_seconds)
        )
        if within:
            best = min(best, aim.nats * nats + aim.seconds * seconds + aim.nbytes * nbytes)
    return best


def value(aim: Aim, answer: Answer | None) -> float:
    if answer is None:
        return float("inf")
    return aim.nats * answer.nats + aim.seconds * answer.seconds + aim.nbytes * answer.nbytes


def whole(table: Table, index: int) -> int:
    return table.nbytes + sum(group[min(index, len(group) - 1)].nbytes for group in table.groups)


@pytest.mark.parametrize("seed", range(3))
def test_no_other_choice_is_better(seed: int) -> None:
    """One child solves them all: starting it takes longer than any of them."""
    rng = random.Random(seed)
    small = table(rng, 5)
    low, high = whole(small, 3), whole(small, 0)
    aims = []
    for part in range(12):
        budget = low + (high - low) * part // 10
        aims += [
            Aim(nats=1.0, most_bytes=budget),
            Aim(nats=50.0, seconds=0.3, most_bytes=budget),
            Aim(seconds=1.0, most_nats=0.02, most_bytes=budget),
            Aim(nats=1.0, most_seconds=2.2, most_bytes=budget),
            Aim(nbytes=1.0, most_nats=0.01 * part),
        ]
    aims.append(Aim(nats=1.0, most_bytes=low - (SIZE // 3 * 2) - 1))
    for aim, answer in zip(aims, solve([small], aims), strict=True):
        expected = tried(small, aim)
        assert value(aim, answer) == pytest.approx(expected, rel=2 * GAP, abs=1e-9), aim
        if answer is not None and aim.most_bytes is not None:
            chosen = [group[choice] for group, choice in zip(small.groups, answer.choices, strict=True)]
            assert small.nbytes + sum(choice.nbytes for choice in chosen) == answer.nbytes <= aim.most_bytes
            assert sum(choice.nats for choice in chosen) == pytest.approx(answer.nats)


def greedy(table: Table, budget: int) -> float:
    """Divergence of raising, one step at a time, what gains most for its bytes."""
    chosen = [len(group) - 1 for group in table.groups]
    left = budget - table.nbytes - sum(group[-1].nbytes for group in table.groups)
    while True:
        steps = []
        for place, (group, choice) in enumerate(zip(table.groups, chosen, strict=True)):
            if choice:
                more = group[choice - 1].nbytes - group[choice].nbytes
                if more <= left:
                    steps.append(((group[choice].nats - group[choice - 1].nats) / more, more, place))
        if not steps:
            return sum(group[choice].nats for group, choice in zip(table.groups, chosen, strict=True))
        _, more, place = max(steps)
        left, chosen[place] = left - more, chosen[place] - 1


def test_greedy_and_uniform_choices_are_never_better_for_many_layers() -> None:
    rng = random.Random(7)
    large = table(rng, 40)
    low, high = whole(large, 3), whole(large, 0)
    budgets = [low + (high - low) * part // 9 for part in range(9)]
    answers = solve([large], [Aim(nats=1.0, most_bytes=budget) for budget in budgets])
    for budget, answer in zip(budgets, answers, strict=True):
        assert answer is not None
        assert answer.nats <= greedy(large, budget) * (1 + GAP)
        for index in range(len(BITS)):
            if whole(large, index) <= budget:
                nats = sum(group[min(index, len(group) - 1)].nats for group in large.groups)
                assert answer.nats <= nats * (1 + GAP)


def test_what_streams_may_be_larger_than_memory_and_takes_its_time() -> None:
    rng = random.Random(1)
    streaming = table(rng, 24, streams=True)
    budget = whole(streaming, 2)
    exact = Aim(seconds=1.0, most_nats=0.0, most_bytes=budget, streams=True)
    in_memory, on_disk = solve([streaming], [Aim(seconds=1.0, most_nats=0.0, most_bytes=budget), exact])
    assert in_memory is None  # not in their own precision
    assert on_disk is not None
    assert on_disk.nats == 0
    assert on_disk.nbytes <= budget
    assert on_disk.streamed >= whole(streaming, 0) - budget
    assert on_disk.seconds >= on_disk.streamed * (streaming.stream_prefill + streaming.stream_decode) * 0.999


def test_of_several_tables_the_best_answers_and_of_equal_ones_the_first() -> None:
    large, small = (table(random.Random(3), 6, fixed, slower=slower) for fixed, slower in ((SIZE, 1.0), (0, 2.0)))
    enough, little = whole(large, 0), whole(large, 1)
    precise, fast, tied = solve(
        [large, small],
        [
            Aim(nats=1.0, most_bytes=enough),
            Aim(seconds=1.0, most_bytes=little),
            Aim(nats=1.0, most_bytes=enough, tie=0.05),
        ],
    )
    assert precise is not None
    assert fast is not None
    assert tied is not None
    assert (precise.table, precise.nats) == (0, 0)
    assert fast.table == 0  # the other one computes prompts more slowly
    assert tied.seconds <= precise.seconds * (1 + GAP)


def test_a_balance_counts_in_times_of_the_fastest() -> None:
    one = table(random.Random(5), 6)
    slow = Table(
        tuple(
            tuple(Choice(each.nbytes, each.nats, 10 * each.prefill, 10 * each.decode) for each in group)
            for group in one.groups
        ),
        prefill=10 * one.prefill,
        decode=10 * one.decode,
    )
    aim = Aim(nats=50.0, seconds=1.0, relative=True, most_bytes=whole(one, 1))
    [here], [there] = solve([one], [aim]), solve([slow], [aim])
    assert here is not None
    assert there is not None
    assert value(aim, here) == pytest.approx(50 * here.nats + here.seconds)
    assert here.nats == pytest.approx(there.nats, rel=0.02)


def test_a_solver_that_fails_is_an_error_and_no_other_plan() -> None:
    with pytest.raises(TightfitError, match=r"process of its own|solver found no plan"):
        solve([Table(((Choice(1, float("nan"), 0.0, 0.0),),))], [Aim(nats=1.0)])
