"""The method that docs/kv-inside.md adds really works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tightfit
from tightfit.catalog import TECHNIQUES

PAGE = (Path(__file__).parents[2] / "docs" / "kv-inside.md").read_text()


@pytest.mark.parametrize("prefill", ["chunked", "layered"])
def test_a_method_as_the_page_adds_it(prefill: str) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    try:
        # As a module: dataclasses look up where they come from.
        exec(compile(code, "docs/kv-inside.md", "exec"), {"__name__": __name__})
        with tightfit.load(
            "nano", "4GiB", context=1024, kv="sparse(keep=128)+int4(recent=32)", prefill=prefill
        ) as model:
            prompt = "#" + "7" * 700
            completion = model.generate(prompt, max_new_tokens=40, temperature=0, ignore_eos=True)
            cache = model._generator.engine.cache
            lengths = [kept.lengths[0].tolist() for kept in cache.layers]  # type: ignore[attr-defined]
            kept = cache.layers[0].positions[0, 0, : lengths[0][0]].tolist()  # type: ignore[attr-defined]
    finally:
        del TECHNIQUES["kv", "sparse"]
    assert len(completion.tokens) == 40
    assert all(128 <= length < 160 for layer in lengths for length in layer)
    assert kept[:4] == [0, 1, 2, 3]
    assert 512 in kept
    assert 301 not in kept
