"""What a cache reserves is enough for the worst that can come, and no more than was promised."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.parity.harness import ROOM

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import PAGE, Pages
from tightfit.kv.base import LayerLayout
from tightfit.kv.cache import Cache, window_slots
from tightfit.kv.compose import compose
from tightfit.kv.make import kv_nbytes
from tightfit.kv.paged import PagedCache
from tightfit.model.batch import Batch, Segment

# ---- enough ----

SMALL = {
    "llama": [LayerLayout(3, 8, 8, 0, heads=3)] * 3,
    "sliding": [LayerLayout(2, 8, 8, 0, heads=2, window=40), LayerLayout(2, 8, 8, 0, heads=2)],
    "latent": [LayerLayout(1, 12, 8, 0, heads=2, shared=True)] * 2,
}
EVICTORS = [
    "",
    "window(keep=40,positions=original)",
    "h2o(keep=37)",
    "d2o(keep=45,budget=adakv)",
    "corm(keep=50,window=20)",
    "scope(keep=60,output=30,recent=8)",
    "mikv(keep=40)",
    "mikv(keep=0.3,budget=adakv)",
    "mikv(keep=50,budget=pyramid)",
] + [
    f"snapkv(keep={keep},window=8,budget={budget})"
    for keep in ("20", "70", "0.5")
    for budget in ("adakv", "pyramid", "dynamickv")
]
CODECS = [
    "",
    "int4(recent=0)",
    "int2(recent=40)",
    "int8(recent=33,of=keys)",
    "int8(recent=0)+think(recent=50)",
    "gear(recent=0)",
]
TIERS = ["", "host(resident=0)", "host(resident=70)", "quest(tokens=32,full=0)", "quest(full=0)+host(resident=32)"]


class Layers:
    """Sequence 0 of a cache, whose tokens look at what is random, and at times at one head's tokens above all."""

    def __init__(self, cache: PagedCache, rng: random.Random) -> None:
        self.cache, self.rng, self.ws = cache, rng, Workspace(Arena(ROOM))
        self.tokens = 0

    def chunk(self, count: int, layered: bool = False) -> None:
        segment = Segment(0, self.tokens, [0] * count)
        self.cache.begin(0, self.tokens)
        with self.ws.frame():
            for layer in range(len(self.cache.layouts)):
                if layered:
                    with self.cache.whole(layer, segment, self.ws):
                        self._attend(layer, segment)
                else:
                    self._attend(layer, segment)
        self.tokens += count
        self.cache.prefilled(0, segment.start, self.tokens)

    def draft(self, count: int, accepted: int) -> None:
        with self.ws.frame():
            for layer in range(len(self.cache.layouts)):
                self._attend(layer, Segment(0, self.tokens, [0] * count, decode=True))
        self.cache.commit(0, range(accepted), self.ws)
        self.tokens += accepted

    def _attend(self, layer: int, segment: Segment) -> None:
        layout, count = self.cache.layouts[layer], len(segment.tokens)
        q = torch.randn(count, layout.heads, layout.key_dim)
        k = torch.randn(count, layout.kv_heads, layout.key_dim)
        k[:, self.rng.randrange(layout.kv_heads)] *= self.rng.choice([0.01, 1.0, 5.0])
        v = None if layout.shared else torch.randn(count, layout.kv_heads, layout.value_dim)
        out = torch.empty(count, layout.heads, layout.value_dim)
        batch = Batch((segment,))
        held = self.cache.update(layer, batch, q, k, v, None, self.ws)
        self.cache.attend_step(layer, batch, held, q, out, self.ws, Scoring(1.0, layout.window))
        assert out.isfinite().all()

    def fill(self, context: int, layered: float, moment: Callable[[], None] = lambda: None) -> None:
        """A prompt of some chunks, or as a whole with a chance of ``layered``, and drafts of which some are accepted,
        up to ``context`` tokens; calls ``moment`` whenever tokens were let go of."""
        prompt = self.rng.randint(1, context)
        if self.rng.random() < layered:
            self.chunk(prompt, layered=True)
        while self.tokens < prompt:
            self.chunk(min(self.rng.choice([1, 5, 48, 300]), prompt - self.tokens))
        self.check_pages()
        while self.tokens < context:
            size = self.rng.randint(1, min(self.cache.room(0), context - self.tokens))
            self.draft(size, self.rng.choice([size, self.rng.randint(0, size)]))
            self.check_pages()
            if self.tokens % PAGE == 0:
                moment()

    def check_pages(self) -> None:
        """Every page of memory is free, or belongs to one head of one of the layers that have theirs in common."""
        pools: dict[int, list[Pages]] = {}
        for pages in self.cache.layers:
            pools.setdefault(pages.dense_free.data_ptr(), []).append(pages)
        for layers in pools.values():
            self._check_pool(layers, self.cache.room(0))
        for lower in self.cache.store.lower:
            if lower is not None:
                self._check_pool([lower.pages], 0)

    def _check_pool(self, layers: list[Pages], room: int) -> None:
        kinds: dict[bool, list[int]] = {False: [], True: []}
        for pages in layers:
            for table, length, coded, cold in zip(
                pages.table[0], pages.lengths[0], pages.coded[0], pages.cold[0], strict=True
            ):
                ahead = int(length) + room  # for which there is room already
                assert (table[int(cold) : -(-ahead // PAGE)] >= 0).all()
                for j in range(int(cold), len(table)):
                    if table[j] >= 0:
                        kinds[pages.coded_keys is not None and j < int(coded)].append(int(table[j]))
        for used, free in ((kinds[False], layers[0].dense_free[0]), (kinds[True], layers[0].coded_free[0])):
            everything = sorted(used + free[1 : 1 + int(free[0])].tolist())
            assert everything == list(range(len(free) - 1))


@settings(deadline=None, phases=[Phase.generate], max_examples=40)
@given(
    model=st.sampled_from(sorted(SMALL)),
    evictor=st.sampled_from(EVICTORS),
    codec=st.sampled_from(CODECS),
    tier=st.sampled_from(TIERS),
    context=st.sampled_from([33, 90, 200, 320]),
    tail=st.sampled_from([1, 2, 17, 70]),
    seed=st.integers(0, 9999),
)
def test_no_run_needs_more_pages_than_are_reserved(
    model: str, evictor: str, codec: str, tier: str, context: int, tail: int, seed: int
) -> None:
    if model == "latent":
        codec = codec.replace("+think(recent=50)", "")
    kv = "+".join(part for part in (evictor, codec, tier) if part) or "int8"
    if "window" in kv and "quest" in kv:
        return
    torch.manual_seed(seed)
    rng = random.Random(seed)
    cache = PagedCache(SMALL[model], compose(kv), context, 1, torch.float32, Arena(ROOM), tail=tail)
    for _ in range(2):  # the second sequence takes the place of the first
        Layers(cache, rng).fill(context, layered=0.3)
        cache.begin(0, 0)
    cache.close()


# ---- as little as was promised ----

CONTEXT, CHUNK = 8192, 512
REAL = {
    "llama": [LayerLayout(8, 128, 128, CONTEXT, heads=32)] * 4,
    # as in Gemma 3: five windows to one layer that sees everything
    "sliding": [
        LayerLayout(4, 256, 256, window_slots(CONTEXT, window, CHUNK), heads=8, window=window)
        for window in (512, 512, 512, 512, 512, None)
    ],
    # as in DeepSeek-V2: a latent of 512 and a rope key of 64
    "latent": [LayerLayout(1, 576, 512, CONTEXT, heads=16, shared=True)] * 4,
}
# Shares of the exact cache in bfloat16. Scales and minima are one bit for each number more; the recent 128 tokens as
# they are, positions, masses and tables take a little.
SHARES = {
    "llama": {
        "int8": (9 / 16, 0.60),
        "int4": (5 / 16, 0.35),
        "int2": (3 / 16, 0.23),
        "int4(of=keys)": (0.5 + 5 / 32, 0.70),
        "int2(recent=0)": (3 / 16, 0.20),
        "think": (0.8, 0.83),
        "think+int4": (0.8 * 5 / 32 + 5 / 32, 0.32),
        "snapkv(keep=512)": (512 / CONTEXT, 0.073),
        "snapkv(keep=512,budget=pyramid)": (512 / CONTEXT, 0.075),
        "h2o(keep=512,budget=adakv)": (512 / CONTEXT, 0.085),
        "d2o(keep=0.25)": (0.25, 0.27),
        "tova(keep=512)": (512 / CONTEXT, 0.073),
        "corm(keep=512)": (512 / CONTEXT, 0.08),
        "window(keep=512)": (512 / CONTEXT, 0.073),
        "snapkv(keep=512)+int4(recent=0)": (5 / 16 / 16, 0.04),
        "quest": (1 + 1 / 64, 1.03),  # in two layers of four
        "host": (256 / CONTEXT, 0.049),
        "host(resident=0)+int4": (128 / CONTEXT, 0.035),
        "host(resident=1024)+int4(recent=0)": (5 / 16 / 8, 0.055),
    },
    # The layers with windows are 5 * 1023 of the 13307 slots.
    "sliding": {
        "int8": (0.44, 0.58),
        "int4": (0.24, 0.38),
        "int2": (0.14, 0.30),
        "snapkv(keep=512)": (512 * 6 / 13307, 0.27),
        "window(keep=1024)": ((512 * 5 + 1024) / 13307, 0.31),
        "host(resident=0)": (0.0, 0.06),
    },
    # Of a layer's only head the recent tokens are there twice while some of them are coded.
    "latent": {
        "int8": (9 / 16, 0.62),
        "int4": (5 / 16, 0.37),
        "int2": (3 / 16, 0.24),
        "snapkv(keep=512)": (512 / CONTEXT, 0.075),
        "window(keep=512,positions=original)": (512 / CONTEXT, 0.075),
        "quest": (1 + 1 / 32, 1.05),  # twice the share of llama: there are no values
        "host": (256 / CONTEXT, 0.05),
    },
}


@pytest.mark.parametrize(("model", "kv"), [(model, kv) for model, shares in SHARES.items() for kv in shares])
def test_compositions_take_the_share_that_they_promise(model: str, kv: str) -> None:
    layouts, least, most = REAL[model], *SHARES[model][kv]
    exact, used = Arena(ROOM), Arena(ROOM)
    Cache(layouts, 1, torch.bfloat16, exact, chunk=CHUNK)
    cache = PagedCache(layouts, compose(kv), CONTEXT, 1, torch.bfloat16, used)
    cache.close()
    assert least <= used.used / exact.used <= most
    assert kv_nbytes(kv, layouts, CONTEXT, 1, "bfloat16") == used.used


@pytest.mark.parametrize("kv", ["snapkv(keep=512)", "window(keep=512)", "h2o(keep=512)+int4", "d2o(keep=512)+host"])
def test_what_keeps_a_number_of_tokens_takes_the_same_for_any_context(kv: str) -> None:
    layouts = REAL["llama"]
    assert kv_nbytes(kv, layouts, 4096, 1, "bfloat16") == kv_nbytes(kv, layouts, 131072, 1, "bfloat16")


@pytest.mark.parametrize("kv", ["none", "int4", "snapkv(keep=0.25)", "quest+host", "h2o(keep=64,budget=adakv)"])
def test_every_sequence_takes_as_much_as_one(kv: str) -> None:
    layouts = REAL["llama"]
    one, four = (kv_nbytes(kv, layouts, 4096, sequences, "bfloat16") for sequences in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.01)
