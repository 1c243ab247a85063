"""Methods with a file run in the engine, inside what the plan reserved for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

import tightfit
from tightfit.kernels import cpu
from tightfit.kernels.pages import Counts

PROMPT = "#" + "7 8 " * 200


@cache
def run(kv: str) -> tuple[list[int], dict[str, Any], Counts]:
    """The tokens, the receipt, and what the cache counted."""
    with tightfit.load("nano", "4GiB", context=1024, kv=kv, threads=1) as model:
        completion = model.generate(PROMPT, max_new_tokens=40, temperature=0, ignore_eos=True)
        receipt = model.receipt()
        account = receipt["accounts"]["kv"]
        assert account["peak_bytes"] <= account["reserved_bytes"]
        return completion.tokens, receipt, model.borrow_engine().cache.stored.fetched


@pytest.mark.parametrize("kv", ["headinfer", "hgca(keep=128,beta=0)", "specache(tokens=960)"])
def test_what_sees_everything_as_it_is_gives_the_same_tokens(kv: str) -> None:
    assert run(kv)[0] == run("none")[0]


@pytest.mark.skipif(not cpu.available(), reason="reading ahead is compiled")
@pytest.mark.parametrize("kv", ["headinfer", "specache(tokens=960)"])
def test_the_receipt_says_what_was_read_ahead(kv: str) -> None:
    _, receipt, counted = run(kv)
    phases = [found for phase in ("prefill", "decode") if (found := receipt[f"{phase}_fetched"]) is not None]
    assert receipt["decode_fetched"] in phases
    assert counted.wanted == sum(found["wanted"] for found in phases) > 0
    assert counted.ahead == pytest.approx(sum(found["wanted"] * found["ahead_rate"] for found in phases))
    assert counted.bytes == sum(found["bytes"] for found in phases) > 0
    assert counted.waited == pytest.approx(sum(found["waited_s"] for found in phases) * 1e9)


@pytest.mark.parametrize("kv", ["none", "hgca(keep=128,beta=0)"])
def test_the_receipt_says_nothing_where_nothing_is_read_ahead(kv: str) -> None:
    receipt = run(kv)[1]
    assert receipt["prefill_fetched"] is None
    assert receipt["decode_fetched"] is None
