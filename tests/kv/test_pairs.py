"""Every two methods compose, and give what a slow reference gives that applies them one after the other, or they are
refused by name."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import combinations, combinations_with_replacement

import pytest
from tests.kv.driver import Run, Tiny, choose, offset
from tests.kv.settings import DEFINED, METHODS, refused
from tests.kv.slow_reference import Slow, owners

from tightfit.errors import UsageError
from tightfit.kv.compose import compose
from tightfit.kv.fitted import Known

PROMPT, DECODED, CHUNK, CONTEXT = 150, 72, 48, 256
MORE = [
    "none",
    "window(keep=60,positions=original,sinks=1)+int4(recent=0)+host(resident=0)",
    "snapkv(keep=72,window=12,budget=adakv)+int4(recent=0)+host(resident=0)",
    "snapkv(keep=0.4,window=12,kernel=3,budget=pyramid)+int4(recent=32,of=keys)+int8(recent=0,of=values)",
    "h2o(keep=40,normalize=true,budget=adakv)+int2(recent=0,of=keys)+quest(tokens=32,full=0)",
    "h2o(keep=90,budget=pyramid)+think(recent=0,prune=0.6)+quest(tokens=32,full=0)+host(resident=0)",
    "think(recent=0)+int4(recent=64)+quest(tokens=64,full=0)+host(resident=32)",
    "int4(recent=0)+quest(tokens=32,full=0)+host(resident=0)",
    "d2o(keep=64,budget=adakv)+int4(recent=0)+quest(tokens=32,full=0)+host(resident=0)",
    "morphkv(keep=70,window=50,fusion=max,budget=adakv)+host(resident=0)",
    "tova(keep=0.4,budget=pyramid)",
    "scissorhands(keep=70,window=12,recent=4,budget=adakv)",
    "corm(keep=40,window=70)",
    "scope(keep=80,output=30,recent=12,update=adaptive,step=4)+int4(recent=0)",
    "scope(keep=100,output=48,recent=12,kernel=1,update=discontinuous,step=3,every=64)",
]


EVERY = list(combinations_with_replacement(METHODS, 2))
COMPOSED = [f"{one}+{other}" for one, other in combinations(DEFINED, 2) if not refused(one, other)]


@pytest.mark.parametrize(("one", "other"), [pair for pair in EVERY if refused(*pair)])
def test_pairs_that_do_not_compose_are_refused_by_name(one: str, other: str) -> None:
    for spec in (f"{one}+{other}", f"{other}+{one}"):
        with pytest.raises(UsageError) as caught:
            compose(spec)
        for method in (one, other):
            assert method.partition("(")[0] in str(caught.value)


def tolerance(kv: str) -> float:
    """How far logits may be apart, as a share of the largest: sums in another order move a few numbers over the edge
    between two codes, and a few scales over that between two numbers of float16; the more so where few are read."""
    coded = max([share for name, share in (("int8", 2e-4), ("int4", 1e-3), ("int2", 6e-3)) if name in kv], default=0.0)
    return max(coded * (8 if "recycled" in kv else 4 if "quest" in kv else 1), 1e-5)


def check(tiny: Tiny, kv: str, layered: bool) -> None:
    whose = owners(kv, len(tiny.spec.layers))
    run = tiny.run(kv, context=CONTEXT, chunk=CHUNK, known=Known(whose))
    slow = Slow(tiny, kv, CHUNK, CONTEXT, rounding=8 * tolerance(kv))
    prompt = tiny.tokens(PROMPT)
    found, expected = run.prefill(prompt, layered=layered), slow.prefill(prompt, layered=layered)
    allowed = tolerance(kv) * float(expected.abs().max())
    apart = []
    for position in range(PROMPT, PROMPT + DECODED):
        if slow.close and kept(run) != slow.kept():
            return  # rounding decided a vote
        apart.append(float((found - expected).abs().max()))
        token = choose(found, position)
        # The same token, unless two are as likely as each other for logits that may be so far apart.
        best, second = offset(expected, position).topk(2).values
        assert token == choose(expected, position) or float(best - second) < 60 * allowed
        found, expected = run.decode(token), slow.forward([token], decode=True)
    assert statistics.median(apart) < allowed
    assert max(apart) < 30 * allowed
    assert kv in ("none", "kvsharer") or kept(run) == slow.kept()


def kept(run: Run) -> list[list[list[int]]]:
    """The positions that each head of each layer keeps."""
    return [[run.positions(layer, head) for head in range(2)] for layer in range(3)]


@pytest.mark.parametrize("kv", [*DEFINED, *COMPOSED, *MORE])
def test_compositions_give_what_methods_give_one_after_the_other(tiny: Callable[..., Tiny], kv: str) -> None:
    check(tiny("llama"), kv, layered=False)


@pytest.mark.parametrize("kv", [kv for kv in (*DEFINED, *MORE) if "kvsharer" not in kv])  # refused: layers wait
def test_layered_compositions_judge_the_whole_prompt(tiny: Callable[..., Tiny], kv: str) -> None:
    check(tiny("llama"), kv, layered=True)


@pytest.mark.parametrize("kv", [*DEFINED, *MORE])
def test_compositions_in_layers_with_sliding_windows(tiny: Callable[..., Tiny], kv: str) -> None:
    check(tiny("sliding"), kv, layered=False)
