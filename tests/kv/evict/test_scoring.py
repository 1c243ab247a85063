"""What each method that scores tokens is for: each of these tests fails with another method in its place."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from tests.kv.driver import Layer

from tightfit.errors import UsageError
from tightfit.kv.base import BLOCK, LayerLayout

KV_HEADS, GROUPS, DIM = 2, 2, 16
HEADS = KV_HEADS * GROUPS
LAYOUT = LayerLayout(KV_HEADS, DIM, DIM, 1024, heads=HEADS)


def alike(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of tokens that look at everything alike."""
    return torch.zeros(count, HEADS, DIM), torch.zeros(count, KV_HEADS, DIM), torch.zeros(count, KV_HEADS, DIM)


def unit(channel: int) -> torch.Tensor:
    return torch.eye(DIM)[channel]


def prefilled(kv: str, *tokens: torch.Tensor, chunk: int | None = None) -> Layer:
    layer, count = Layer(kv, LAYOUT, 1024), len(tokens[0])
    for a in range(0, count, chunk or count):
        layer.add(*(x[a : a + (chunk or count)] for x in tokens))
    return layer


# ---- tova ----


def test_tova_keeps_what_the_last_query_looks_at_and_nothing_else() -> None:
    """Neither what all others look at, nor recent tokens; and the same tokens in all heads."""
    q, k, v = alike(200)
    k[40:50] = 20 * unit(0)
    q[:-1] = unit(0)
    k[90:100, 0] = 20 * unit(1)  # one head of two has keys that the last query finds
    q[-1] = unit(1)
    for kv, kept in (("tova(keep=10)", range(90, 100)), ("h2o(keep=10,recent=0)", range(40, 50))):
        layer = prefilled(kv, q, k, v)
        assert [layer.positions(head) for head in range(KV_HEADS)] == [list(kept)] * KV_HEADS


def test_tova_judges_what_is_generated_by_the_last_query_of_each_block() -> None:
    layer = prefilled("tova(keep=2)", *alike(2))
    q, k, v = alike(BLOCK - 2)
    k[3], k[4:6] = 20 * unit(0), 20 * unit(1)
    q[:-1], q[-1] = unit(0), unit(1)
    layer.add(q, k, v, decode=True)
    assert layer.positions(0) == [6, 7]


def test_tova_has_no_budgets_of_heads() -> None:
    with pytest.raises(UsageError, match="the same tokens in all heads"):
        prefilled("tova(keep=10,budget=adakv)", *alike(1))


# ---- scissorhands ----


def test_scissorhands_counts_how_often_a_token_is_important_not_how_much() -> None:
    """Four queries look at one token alone; all look at ten others somewhat more than on average."""
    q, k, v = alike(256)
    k[20] = 40 * unit(0)
    q[100:256:40] += 2 * unit(0)
    k[50:60] = 4 * unit(1)
    q += unit(1)
    layer = prefilled("scissorhands(keep=14,recent=4,window=256)", q, k, v)
    heavy = prefilled("h2o(keep=5,recent=0)", q, k, v)
    assert layer.positions(0) == [*range(50, 60), *range(252, 256)]
    assert 20 in heavy.positions(0)


def test_scissorhands_forgets_what_was_important_before_its_history() -> None:
    q, k, v = alike(256)
    k[50], k[60] = 40 * unit(0), 40 * unit(1)
    q[:192], q[192:] = unit(0), unit(1)
    # 64 tokens are as new as the history of 64 queries is long, and were not found unimportant more often than any.
    layers = [prefilled(f"scissorhands(keep=66,recent=1,window={w})", q, k, v) for w in (64, 256)]
    assert [50 in layer.positions(0) for layer in layers] == [False, True]
    assert [60 in layer.positions(0) for layer in layers] == [True, False]


# ---- corm ----


def test_corm_keeps_as_few_as_its_queries_need_and_no_more_than_its_most() -> None:
    q, k, v = alike(300)
    needed = [11, 70, 190]
    k[needed] = 60 * unit(0)
    q[-16:] = unit(0)
    few = prefilled("corm(keep=100,window=16)", q, k, v)
    assert few.positions(0) == [*needed, *range(284, 300)]
    few.add(q[-20:], *alike(20)[1:], decode=True)  # and what is generated is not kept for being new
    assert few.positions(0) == [*needed, *range(304, 320)]
    k[100:250] = 60 * unit(0)
    most = prefilled("corm(keep=100,window=16)", q, k, v)
    assert most.length(0) == 100


def test_corm_keeps_what_any_one_of_the_recent_queries_needs() -> None:
    """However much more others of them look at something else, which h2o and snapkv would keep."""
    q, k, v = alike(300)
    k[30], k[80:120] = 60 * unit(0), 30 * unit(1)
    q[-16:] = unit(1)
    q[-7] = unit(0)
    assert 30 in prefilled("corm(keep=60,window=16)", q, k, v).positions(0)
    assert 30 not in prefilled("corm(keep=60,window=4)", q, k, v).positions(0)


# ---- morphkv ----


def test_morphkv_forgets_what_only_old_queries_looked_at() -> None:
    q, k, v = alike(256)
    k[[10, 20, 30]] = 40 * unit(0)
    q[:] = unit(0)
    kept = {}
    for kv in ("morphkv(keep=19,window=16)", "h2o(keep=19,recent=0.85)"):
        layer = prefilled(kv, q, k, v)
        assert {10, 20, 30} <= set(layer.positions(0))
        layer.add(*away(2 * BLOCK), decode=True)
        kept[kv.partition("(")[0]] = layer.positions(0)
    assert kept["h2o"][:3] == [10, 20, 30]
    assert not {10, 20, 30} & set(kept["morphkv"])
    assert kept["morphkv"][-16:] == list(range(304, 320))


def test_morphkv_looks_back_over_as_many_blocks_as_its_window_has() -> None:
    """What the queries of one block looked at counts until the window has passed it."""
    for window, remembered in ((32, 1), (96, 3)):
        q, k, v = alike(128)
        k[[10, 20]] = 40 * unit(0)
        q[96:] = unit(0)
        layer = prefilled(f"morphkv(keep={window + 2},window={window})", q, k, v)
        blocks = 0
        while 10 in layer.positions(0):
            layer.add(*away(BLOCK), decode=True)
            blocks += 1
        assert blocks == remembered


def away(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens that look less at keys of channel 0 than at others."""
    q, k, v = alike(count)
    return q - unit(0), k, v


def test_morphkv_fuses_by_sum_or_by_the_most_that_one_query_gives() -> None:
    q, k, v = alike(128)
    k[10], k[20] = 40 * unit(0), 20 * unit(1)
    q[-16:] = 0.9 * unit(1)
    q[-3] = 2 * unit(0)
    by_sum, by_max = (prefilled(f"morphkv(keep=17,window=16,fusion={f})", q, k, v).positions(0) for f in ("sum", "max"))
    assert by_sum[0] == 20
    assert by_max[0] == 10


# ---- scope ----


def generated(kv: str, count: int) -> list[list[int]]:
    """The positions after each block of tokens that are generated, which look at position 210 alone, behind a prompt of
    192 tokens."""
    layer = prefilled(kv, *alike(192), chunk=64)
    kept = [layer.positions(0)]
    for block in range(count // BLOCK):
        q, k, v = alike(BLOCK)
        if block == 0:
            k[210 - 192] = 40 * unit(0)
        layer.add(q + unit(0), k, v, decode=True)
        kept.append(layer.positions(0))
    return kept


def test_scope_never_lets_tokens_of_the_prompt_go_for_what_is_generated() -> None:
    prompt, *later = generated("scope(keep=100,output=40,recent=16)", 192)
    assert len(prompt) == 60
    for kept in later:
        assert [place for place in kept if place < 192] == prompt
    assert [len(kept) for kept in later] == [92, *[100] * 5]
    assert 210 in later[-1]
    assert later[-1][-16:] == list(range(368, 384))
    other = generated("h2o(keep=100,recent=0.4)", 192)
    assert [place for place in other[-1] if place < 192] != other[0]


def test_scope_does_not_let_what_is_generated_displace_itself_before_it_must() -> None:
    """Room grows with what is generated in the adaptive way, and at every 64th token in the discontinuous one."""
    settings = "keep=120,output=60,recent=20,step=4"
    adaptive = generated(f"scope({settings},update=adaptive)", 192)
    assert [len(kept) - 60 for kept in adaptive] == [0, 28, 36, 44, 52, 60, 60]
    jumping = generated(f"scope({settings},update=discontinuous,every=64)", 192)
    assert [len(kept) - 60 for kept in jumping] == [0, 32, 28, 60, 28, 60, 28]
    chosen = sum(len(kept) < len(before) + BLOCK for before, kept in itertools.pairwise(jumping))
    assert chosen == 3
    for kept in (*adaptive[1:], *jumping[1:]):
        assert 210 in kept


def test_scope_gives_its_budgets_to_what_a_window_shows() -> None:
    """Tokens that no query sees any more take nobody's place, however much the last queries gave them."""
    layer, (q, k, v) = Layer("scope(keep=20,output=5,recent=2)", replace(LAYOUT, window=40), 1024), alike(100)
    k[:60] = 40 * unit(0)
    layer.add(q + unit(0), k, v)
    assert layer.length(0) == 15
    assert min(layer.positions(0)) > 60


def test_scope_takes_no_share_and_no_other_budget() -> None:
    for kv in ("scope(keep=0.5)", "scope(budget=adakv)", "scope(output=600)", "scope(update=sometimes)"):
        with pytest.raises(UsageError):
            prefilled(kv, *alike(1))
