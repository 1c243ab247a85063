"""Caches of methods, measured from outside: the peak stays inside the smallest budget that is stated for them, and what
they reserve is what they use."""

from __future__ import annotations

import pytest
from tests.measure import run_measured
from tests.memory.test_budget import check, command, generate, smallest_bytes

import tightfit

PROMPT, NEW, CONTEXT = 3900, 100, 4096
# The share of the exact cache that a method reserves, at most; KIVI's recent window is a tenth of this context.
METHODS = {
    "int8": 0.66,
    "int4(recent=32)+think": 0.36,
    "h2o(keep=512)": 0.16,
    "snapkv(keep=512,budget=adakv)": 0.18,
    "snapkv(keep=1024)+int4(recent=32)": 0.14,
    "host(resident=128)": 0.07,
    "quest(tokens=256)+int4": 0.46,
    "clusterkv(tokens=256,size=10)+int4": 0.6,
    "recycled(tokens=256)+int4": 0.46,
    "snapkv(keep=512)+int4+host(resident=64)": 0.09,
}


@pytest.mark.parametrize("kv", METHODS)
def test_a_full_context_stays_inside_the_smallest_budget_of_its_methods(kv: str) -> None:
    options = ("--context", CONTEXT, "--kv", kv)
    smallest = smallest_bytes("nano", *options)
    receipt = check(run_measured(generate("nano", PROMPT, NEW, *options, "--memory", smallest)), smallest, 0.9)
    account = receipt["accounts"]["kv"]
    exact = CONTEXT * 8 * 2 * 2 * 64 * 2  # 8 layers, 2 heads, keys and values of 64 numbers in bfloat16
    assert account["reserved_bytes"] <= METHODS[kv] * exact
    # Lists, room for 32 more tokens and pages that are not full are the rest: much of a cache of a megabyte.
    assert account["peak_bytes"] >= 0.65 * account["reserved_bytes"]


@pytest.mark.parametrize("kv", ["none", "snapkv(keep=512)", "h2o(keep=512,budget=adakv)+int4(recent=32)"])
def test_prompts_layer_by_layer_stay_inside_the_smallest_budget(kv: str) -> None:
    options = ("--context", CONTEXT, "--kv", kv, "--prefill", "layered")
    smallest = smallest_bytes("nano", *options)
    check(run_measured(generate("nano", PROMPT, NEW, *options, "--memory", smallest)), smallest, 0.9)
    less = run_measured(generate("nano", PROMPT, NEW, *options, "--memory", smallest * 95 // 100))
    assert less.exit_code == tightfit.BudgetError.exit_status


def test_several_sequences_have_caches_of_their_own() -> None:
    options = ("--context", 2048, "--kv", "snapkv(keep=256)+int4(recent=32)", "--batch", 4)
    prompts = [part for text in ("#" + "7" * 1800,) * 4 for part in ("-p", text)]
    smallest = smallest_bytes("nano", *options)
    arguments = ["run", "nano", *prompts, "-n", "60", "--ignore-eos", "--json", *options, "--memory", smallest]
    check(run_measured(command(*arguments)), smallest, at_least=0.9)


def test_a_number_of_bytes_is_kept_under() -> None:
    done = run_measured(generate("nano", PROMPT, NEW, "--context", CONTEXT, "--kv", "2MiB", "--memory", "400MiB"))
    receipt = check(done, 400 << 20)
    assert 1.8 * 2**20 < receipt["accounts"]["kv"]["reserved_bytes"] <= 2 << 20
    assert receipt["plan"]["cache"].startswith("snapkv(keep=")
