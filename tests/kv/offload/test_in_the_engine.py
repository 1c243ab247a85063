"""Methods with a file run in the engine, inside what the plan reserved for them."""

from __future__ import annotations

from functools import cache

import pytest

import tightfit

PROMPT = "#" + "7 8 " * 200


@cache
def run(kv: str) -> list[int]:
    with tightfit.load("nano", "4GiB", context=1024, kv=kv, threads=1) as model:
        completion = model.generate(PROMPT, max_new_tokens=40, temperature=0, ignore_eos=True)
        account = model.receipt()["accounts"]["kv"]
        assert account["peak_bytes"] <= account["reserved_bytes"]
    return completion.tokens


@pytest.mark.parametrize("kv", ["headinfer", "hgca(keep=128,beta=0)", "specache(tokens=960)"])
def test_what_sees_everything_as_it_is_gives_the_same_tokens(kv: str) -> None:
    assert run(kv) == run("none")
