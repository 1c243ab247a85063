"""What is freed goes back, and what libraries keep is bounded. Each claim is checked in a process of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tests.measure import run_measured

from tightfit.budget.malloc import ENVIRONMENT

SOURCES = str(Path(__file__).parents[2] / "src")
START = "from tightfit.budget.malloc import *; from tightfit.budget.meter import resident_set; tuned = tune_malloc()\n"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")


def run(code: str, **environment: str) -> list[str]:
    """The words that ``code`` prints."""
    measured = run_measured(
        [sys.executable, "-c", START + code], env=os.environ | {"PYTHONPATH": SOURCES} | environment
    )
    assert measured.exit_code == 0, measured.stderr
    return measured.stdout.split()


def test_large_buffers_go_back_when_small_ones_stay() -> None:
    code = """
for size in (4, 8, 16, 30):
    block = bytearray(b"1") * (size << 20); del block  # glibc would raise its threshold to the size of each
before, kept = resident_set().current, []
for turn in range(20):
    blocks = [bytearray(b"1") * ((9 + turn % 3 * 5) << 20) for _ in range(4)]
    kept.append(bytearray(b"1") * (80 << 10))
    del blocks
print(tuned, resident_set().current - before)
"""
    tuned, grown = run(code)
    if tuned == "False":
        pytest.skip("another allocator than glibc's")
    assert int(grown) < 6 << 20  # 1.6 MiB are kept; 76 MiB stay with the thresholds as they are


def test_small_temporaries_are_not_mapped_anew_each_time() -> None:
    code = """
import resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(500):
    block = bytearray(b"1") * (500 << 10)
    del block
print(tuned, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    tuned, faults = run(code)
    if tuned == "False":
        pytest.skip("another allocator than glibc's")
    assert int(faults) < 5000  # 125 pages of 4 KiB once; 62,500 if each block were given back


def test_large_blocks_that_come_and_go_leave_no_holes_while_they_are_apart() -> None:
    code = """
import random
def holes():
    before, small, rng, held = resident_set().current, [], random.Random(0), [b""] * 9
    for _ in range(1000):
        place = rng.randrange(9)
        held[place] = b""
        held[place] = bytearray(b"1") * rng.randrange(300 << 10, 4 << 20)
        small.append(bytearray(b"1") * 5000)
    return resident_set().current - before - sum(map(len, held)) - sum(map(len, small))
with large_blocks_apart():
    print(tuned, holes())
print(holes())
"""
    tuned, apart, together = run(code)
    if tuned == "False":
        pytest.skip("another allocator than glibc's")
    assert int(apart) < 2 << 20
    assert int(together) > 8 << 20  # 16 MiB on the heap: afterwards the allocator is as before


def test_trim_gives_back_the_middle_of_the_heap() -> None:
    code = """
blocks = [bytearray(b"1") * (100 << 10) for _ in range(400)]
kept = blocks[::20]  # so that the end of the heap is in use
del blocks
before = resident_set().current
print(tuned, trim(), before - resident_set().current)
"""
    tuned, trimmed, given_back = run(code)
    if tuned == "False":
        pytest.skip("another allocator than glibc's")
    assert trimmed == "True"
    assert int(given_back) > 30 << 20  # of 37 MiB


def test_the_environment_of_the_libraries_is_set_and_what_a_user_set_stays() -> None:
    names = " ".join(ENVIRONMENT)
    code = f"import os; print(*(os.environ[name] for name in {names!r}.split()))"
    empty = dict.fromkeys(ENVIRONMENT, "")
    assert run(f"import os, subprocess\n{code}", **{**ENVIRONMENT, "OMP_WAIT_POLICY": "active"}) == [
        "active" if name == "OMP_WAIT_POLICY" else value for name, value in ENVIRONMENT.items()
    ]
    clear = f"[os.environ.pop(name) for name in {names!r}.split()]; tune_malloc()\n"
    assert run(f"import os\n{clear}{code}", **empty) == list(ENVIRONMENT.values())


def test_products_of_many_shapes_do_not_pile_up_compiled_code() -> None:
    code = """
import torch
torch.set_num_threads(1)
x, w = torch.randn(400, 256).bfloat16(), torch.randn(256, 300).bfloat16()
before = resident_set().current
for rows in range(1, 400, 4):
    torch.mm(x[:rows], w, out=torch.empty(rows, 300, dtype=torch.bfloat16))
print(resident_set().current - before)
"""
    (grown,) = run(code)
    assert int(grown) < 40 << 20  # 27 MiB; 86 MiB with the caches as they are
