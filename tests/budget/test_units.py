"""Bytes are read and written as people mean them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.budget.meter import Memory
from tightfit.budget.units import GiB, KiB, MiB, format_bytes, parse_budget, parse_bytes
from tightfit.errors import UsageError

MACHINE = Memory(total=32 * GiB, available=10 * GiB, resident=GiB // 2, limited_by="the machine", source="the machine")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (600 * MiB, "600 MiB"),
        (1536 * MiB, "1.5 GiB"),
        (1100 * MiB, "1100 MiB"),  # 1.07421875 GiB would not be exact
        (15 * GiB + 300 * MiB, "15.3 GiB"),
        (GiB - 1, "1 GiB"),
        (3 * 1024 * GiB, "3 TiB"),
        (-5 * MiB, "-5 MiB"),
    ],
)
def test_bytes_are_written_in_the_unit_that_reads_best(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.integers(0, 9999), st.sampled_from([KiB, MiB, GiB]))
def test_whole_numbers_of_a_unit_are_written_exactly(count: int, unit: int) -> None:
    assert parse_bytes(format_bytes(count * unit)) == count * unit


@given(st.integers(1, 1 << 50))
def test_a_needed_budget_is_rounded_up_and_by_at_most_one_part_in_a_hundred(nbytes: int) -> None:
    stated = parse_bytes(format_bytes(nbytes, ceil=True))
    assert nbytes <= stated <= nbytes * 1.0101 + 1  # the step from 1.00 to 1.01 is the coarsest


@given(st.integers(1, 1 << 50))
def test_a_rounded_number_is_within_half_a_part_in_a_hundred(nbytes: int) -> None:
    assert abs(parse_bytes(format_bytes(nbytes)) - nbytes) <= nbytes * 0.0051 + 1


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("600MiB", 600 * MiB),
        ("4GB", 4_000_000_000),
        ("2.5GiB", 2 * GiB + 512 * MiB),
        ("1g", GiB),
        ("512m", 512 * MiB),
        ("512M", 512 * MiB),
        ("64k", 64 * KiB),
        ("10kB", 10_000),
        ("1.5 GiB", GiB + 512 * MiB),
        (" 12345 ", 12345),
        ("100B", 100),
        ("2TiB", 2048 * GiB),
        (".5GiB", 512 * MiB),
        ("0.3KiB", 307),  # 307.2, rounded down
    ],
)
def test_bytes_are_read_in_all_usual_forms(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "4 GiBs", "1,5GiB", "1e9", "0x10", "1.5", "nan", "٤GiB", "9" * 5000]
)
def test_what_is_not_a_number_of_bytes_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_bytes(text)
    assert "600MiB" in refused.value.hint


def test_a_share_is_of_what_the_machine_has() -> None:
    assert parse_budget("50%", MACHINE) == 16 * GiB
    assert parse_budget("12.5 %", MACHINE) == 4 * GiB


def test_a_size_is_taken_as_it_is() -> None:
    assert parse_budget("600MiB", MACHINE) == 600 * MiB
    assert parse_budget(12345, MACHINE) == 12345


def test_the_default_is_what_this_process_can_hold_less_a_margin() -> None:
    # 10.5 GiB, of which a sixteenth is 672 MiB.
    assert parse_budget(None, MACHINE) == 10 * GiB + 512 * MiB - 672 * MiB
    small = Memory(total=200 * MiB, available=180 * MiB, resident=10 * MiB, limited_by="cgroup v2", source="cgroup v2")
    assert parse_budget(None, small) == 158 * MiB  # a sixteenth would be too little for others: 32 MiB
    large = Memory(total=512 * GiB, available=500 * GiB, resident=0, limited_by="the machine", source="the machine")
    assert parse_budget(None, large) == 499 * GiB  # and here too much: 1 GiB


def test_the_default_never_exceeds_the_total() -> None:
    # Shared pages may be counted as available and as resident.
    memory = Memory(total=GiB, available=GiB, resident=GiB // 4, limited_by="cgroup v1", source="cgroup v1")
    assert parse_budget(None, memory) == GiB - 64 * MiB


@pytest.mark.parametrize("text", ["0", "0%", "101%", "half", "50%%", "", -5, 0])
def test_an_impossible_budget_is_refused(text: str | int) -> None:
    with pytest.raises(UsageError) as refused:
        parse_budget(text, MACHINE)
    assert str(text) in refused.value.message
    assert refused.value.hint
