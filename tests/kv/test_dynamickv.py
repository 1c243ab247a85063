"""Layers that share what they keep: as much together for every prompt, and each what the prompt asks for."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.kv.driver import Tiny
from tests.kv.test_bytes import Layers
from tests.parity.harness import ROOM

from tightfit.budget.ledger import Arena
from tightfit.errors import UsageError
from tightfit.kernels.attention import Scoring
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.make import kv_nbytes
from tightfit.kv.method import Seen
from tightfit.kv.paged import PagedCache
from tightfit.kv.pooled import Pooled
from tightfit.model.batch import Batch, Segment

KEEP, WINDOW = 40, 8
KV = f"snapkv(keep={KEEP},window={WINDOW},budget=dynamickv)"


def kept(cache: PagedCache, layer: int) -> int:
    lengths = cache.layers[layer].lengths[0]
    assert (lengths == lengths[0]).all()
    return int(lengths[0])


@pytest.mark.parametrize("layered", [False, True])
def test_layers_keep_what_scores_highest_in_all_of_them(tiny: Callable[..., Tiny], layered: bool) -> None:
    """As one choice among the tokens of all layers would, though no layer waits for the next."""
    model = tiny("llama")
    tokens = model.tokens(150)
    chunk = 64 if layered else 150  # one chunk is a whole prompt too
    everything = model.run(f"snapkv(keep=400,window={WINDOW})", chunk=chunk)
    found = model.run(KV, chunk=chunk)
    everything.prefill(tokens, layered=layered)
    found.prefill(tokens, layered=layered)
    evictor, observed, layers = compose(KV).evictor, everything.paged.store.observed, range(len(model.spec.layers))
    assert evictor is not None
    assert observed is not None
    scores = []
    for layer in layers:
        mass = observed.mass[layer][0, :, :, : len(tokens)].sum(1)
        positions = torch.arange(len(tokens)).expand(2, -1)
        scores.append(
            evictor.scores(
                Seen(mass, positions, [len(tokens)] * 2, 3, 0, len(tokens), len(tokens), KEEP, -1, None, None)
            )[:, : len(tokens) - WINDOW]
        )
    best = torch.stack(scores).flatten().topk((KEEP - WINDOW) * len(scores) * 2).indices
    share = torch.bincount(best // scores[0].numel(), minlength=len(scores)) / 2
    for layer in layers:
        count = kept(found.paged, layer) - WINDOW
        assert abs(count - float(share[layer])) < 1  # whole tokens of each head
        for head in range(2):
            expected = sorted(scores[layer][head].topk(count).indices.tolist())
            assert found.positions(layer, head) == [*expected, *range(len(tokens) - WINDOW, len(tokens))]


class Concentrated(Layers):
    """Layers some of which look at few tokens, and others at all alike, other ones in each step."""

    def _attend(self, layer: int, segment: Segment) -> None:
        layout, count = self.cache.layouts[layer], len(segment.tokens)
        q = torch.randn(count, layout.heads, layout.key_dim) * self.rng.choice([0.0, 0.3, 3.0, 10.0])
        k, v = torch.randn(2, count, layout.kv_heads, layout.key_dim)
        out, batch = torch.empty(count, layout.heads, layout.value_dim), Batch((segment,))
        held = self.cache.update(layer, batch, q, k, v, None, self.ws)
        self.cache.attend_step(layer, batch, held, q, out, self.ws, Scoring(1.0, layout.window))
        assert out.isfinite().all()


@settings(deadline=None, phases=[Phase.generate], max_examples=6)
@given(
    evictor=st.sampled_from(["snapkv(keep=40,window=8", "h2o(keep=33", "snapkv(keep=0.3,window=4", "h2o(keep=0.5"]),
    more=st.sampled_from(["", "+int4(recent=0)", "+int2(recent=40)+host(resident=32)", "+host(resident=0)"]),
    tail=st.sampled_from([1, 17, 70]),
    seed=st.integers(0, 9999),
)
def test_what_is_reserved_for_all_layers_is_enough_at_every_moment_and_all_of_it_is_used(
    evictor: str, more: str, tail: int, seed: int
) -> None:
    torch.manual_seed(seed)
    rng, context = random.Random(seed), 200
    layouts = [LayerLayout(2, 8, 8, 0, heads=4)] * 5
    cache = PagedCache(
        layouts, compose(f"{evictor},budget=dynamickv){more}"), context, 1, torch.float32, Arena(ROOM), tail=tail
    )
    limit = cache.store.reserved.limit

    def check_sum() -> None:
        assert sum(kept(cache, layer) for layer in range(5)) <= 5 * limit(0, int(cache.tokens[0]))

    for _ in range(2):
        Concentrated(cache, rng).fill(context, layered=0.4, moment=check_sum)
        cache.begin(0, 0)
    cache.close()


@given(seed=st.integers(0, 9999), counts=st.lists(st.integers(0, 60), min_size=4, max_size=4))
@settings(deadline=None, max_examples=50)
def test_budgets_of_layers_add_up_to_the_cap_for_every_prompt(seed: int, counts: list[int]) -> None:
    torch.manual_seed(seed)
    keep, most, heads = 10, 30, 3
    pooled = Pooled(range(4), 1, heads, 60, Arena(ROOM))
    scores = [torch.rand(heads, count) ** torch.randint(1, 9, ()) for count in counts]
    for layer in range(3):
        pooled.note(layer, 0, scores[layer])
    share = pooled.share(3, 0, scores[3], keep, most)
    there = [min(count, most) for count in counts]
    assert sum(share.values()) == min(4 * keep, sum(there))
    assert all(share[layer] <= there[layer] for layer in range(4))


def test_budgets_follow_the_prompt(tiny: Callable[..., Tiny]) -> None:
    model = tiny("llama")
    budgets = []
    for seed in range(4):
        run = model.run(KV, chunk=48)
        run.prefill(model.tokens(150, seed=seed))
        budgets.append(tuple(kept(run.paged, layer) for layer in range(len(model.spec.layers))))
    assert {sum(each) for each in budgets} == {KEEP * 3}
    assert len(set(budgets)) > 1
    assert (KEEP,) * 3 not in budgets


def test_layers_that_share_take_no_more_keys_and_values(tiny: Callable[..., Tiny]) -> None:
    """What is more are lists for as many tokens as one layer may have."""
    layouts = [LayerLayout(8, 128, 128, 8192, heads=32)] * 8
    specs = [f"snapkv(keep=512,budget={budget})" for budget in ("uniform", "dynamickv")]
    even, shared = (kv_nbytes(spec, layouts, 8192, 1, "bfloat16") for spec in specs)
    lists = 8 * 8 * 4 * 512 * (4 + 3 * 4 + 4)  # positions, what tokens received in three blocks, and scores
    assert shared - even < 1.1 * lists
    one = kv_nbytes("snapkv(keep=512,budget=dynamickv)", layouts, 32768, 1, "bfloat16")
    assert one == shared


@pytest.mark.parametrize("kv", ["corm(budget=dynamickv)", "scope(budget=dynamickv)", "d2o(budget=dynamickv)"])
def test_methods_whose_heads_keep_other_numbers_are_refused(kv: str) -> None:
    with pytest.raises(UsageError, match=kv.partition("(")[0]):
        compose(kv)


def test_layers_that_others_read_do_not_let_go_when_it_is_not_their_turn() -> None:
    with pytest.raises(UsageError, match="snapkv does not go with kvsharer"):
        compose("snapkv(budget=dynamickv)+kvsharer")
