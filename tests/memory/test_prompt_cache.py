"""A prompt cache that is full, in memory and on the disk, measured from outside: the peak stays inside the smallest
budget that is stated for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.measure import Measured, run_measured
from tests.memory.test_budget import MIB, check, command, smallest_bytes

import tightfit

CONTEXT, PROMPT = 2048, 1900
FILES = 20 * MIB


@pytest.mark.parametrize(("kv", "size"), [("none", 24 * MIB), ("int4", 6 * MIB)])
def test_a_full_prompt_cache_stays_inside_the_smallest_budget(kv: str, size: int, tmp_path: Path) -> None:
    # Of each prompt 7.5 MiB are kept, or 2.2 MiB in 4 bits: five do not all fit into memory, nor on the disk.
    kept = ("--prompt-cache", size, "--prompt-cache-disk", FILES, "--prompt-cache-dir", tmp_path)
    # Bits and chunks that are left open follow from the last byte that is left, and with others nothing is found.
    options = ("--context", CONTEXT, "--batch", 1, "--kv", kv, "--weights", "int4", "--chunk", 128, *kept)
    smallest = smallest_bytes("nano", *options)

    def run(digits: str, budget: int) -> Measured:
        prompts = [part for digit in digits for part in ("-p", "#" + digit * PROMPT)]
        return run_measured(
            command("run", "nano", *prompts, "-n", 2, "--ignore-eos", "--json", *options, "--memory", budget)
        )

    for digits in ("23456", "65432"):  # the last ones are still there the next time
        receipt = check(run(digits, smallest), smallest, at_least=0.9)
        found = receipt["prompt_cache"]
        assert 0.7 * size < found["bytes"] <= size
        assert receipt["accounts"]["kv"]["peak_bytes"] <= receipt["accounts"]["kv"]["reserved_bytes"]
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= FILES
        assert (found["disk_hits"] > 0) is (digits == "65432")
    assert run("2", smallest * 95 // 100).exit_code == tightfit.BudgetError.exit_status
