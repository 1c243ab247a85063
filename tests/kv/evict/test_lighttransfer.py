"""The laziest layers are found while the prompt is computed, and take as much as they are told to for any context."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.kv.test_bytes import Layers
from tests.parity.harness import ROOM

from tightfit.budget.ledger import Arena
from tightfit.errors import UsageError
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import PAGE
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.make import kv_nbytes
from tightfit.kv.paged import PagedCache
from tightfit.model.batch import Batch, Segment

LAYERS, SINKS, RECENT = 6, 4, 28
LAYOUTS = [LayerLayout(2, 8, 8, 0, heads=4)] * LAYERS


class Looking(Layers):
    """Layers whose queries look at the first token (1.0), at all alike (0.0), or anything between."""

    def __init__(self, cache: PagedCache, laziness: list[float]) -> None:
        super().__init__(cache, random.Random(0))
        self.laziness = laziness

    def _attend(self, layer: int, segment: Segment) -> None:
        layout, count = self.cache.layouts[layer], len(segment.tokens)
        k, v = 0.1 * torch.randn(2, count, layout.kv_heads, layout.key_dim)
        if segment.start == 0:
            k[0] = torch.eye(layout.key_dim)[0] * 8
        q = torch.eye(layout.key_dim)[0].expand(count, layout.heads, -1) * self.laziness[layer]
        out, batch = torch.empty(count, layout.heads, layout.value_dim), Batch((segment,))
        held = self.cache.update(layer, batch, q.clone(), k, v, None, self.ws)
        self.cache.attend_step(layer, batch, held, q.clone(), out, self.ws, Scoring(1.0))
        assert out.isfinite().all()

    def lengths(self) -> list[int]:
        return [int(pages.lengths[0, 0]) for pages in self.cache.layers]


def cache_of(share: float = 0.5, more: str = "", context: int = 300, tail: int = 1) -> PagedCache:
    kv = f"lighttransfer(sinks={SINKS},recent={RECENT},window=8,lazy_share={share}){more}"
    return PagedCache(LAYOUTS, compose(kv), context, 1, torch.float32, Arena(ROOM), tail=tail)


@settings(deadline=None, phases=[Phase.generate], max_examples=8)
@given(
    order=st.permutations(range(LAYERS)),
    prompt=st.integers(24, 250),  # in fewer all are first or recent ones
    chunk=st.sampled_from([20, 48, 300]),
    layered=st.booleans(),
    share=st.sampled_from([0.5, 1 / 3, 0.0, 1.0]),
    more=st.sampled_from(["", "+int4(recent=0)", "+host(resident=32)"]),
    tail=st.sampled_from([1, 17, 40]),
    seed=st.integers(0, 999),
)
def test_the_laziest_layers_are_found_and_never_more_than_are_reserved(
    order: list[int], prompt: int, chunk: int, layered: bool, share: float, more: str, tail: int, seed: int
) -> None:
    torch.manual_seed(seed)
    cache, rng = cache_of(share, more, tail=tail), random.Random(seed)
    for _ in range(2):  # the second sequence takes the place of the first
        layers = Looking(cache, [0.2 * rank for rank in order])
        while layers.tokens < prompt:
            layers.chunk(prompt if layered else min(chunk, prompt - layers.tokens), layered)
            layers.check_pages()
        while layers.tokens < 300:
            size = min(cache.room(0), 300 - layers.tokens)
            layers.draft(size, rng.randint(1, size))
            layers.check_pages()
        lazy = {layer for layer, length in enumerate(layers.lengths()) if length < 300}
        assert lazy == {layer for layer, rank in enumerate(order) if rank >= LAYERS - round(share * LAYERS)}
        assert all(layers.lengths()[layer] < SINKS + RECENT + PAGE + 1 for layer in lazy)
        cache.begin(0, 0)
    cache.close()


def test_what_lazy_layers_keep_are_first_and_recent_tokens() -> None:
    layers = Looking(cache_of(), [0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    layers.chunk(200, layered=True)
    assert layers.lengths() == [200, 32, 200, 32, 200, 32]


def test_a_layer_is_as_lazy_as_the_share_of_attention_that_it_would_keep() -> None:
    """And no token counts twice, in however few tokens."""
    streaming = cache_of().settling.streaming
    assert streaming is not None
    for count in (1, 3, 6, 7, 20, 200):
        given = torch.rand(2, count)
        kept = [at < SINKS or at >= count - min(RECENT, count // 2) for at in range(count)]
        share = float(given[:, kept].sum() / given.sum())
        assert streaming._ratio(given) == pytest.approx(share, rel=1e-5)


def test_bytes_of_lazy_layers_are_constant() -> None:
    """Twice the context is twice the bytes for half of the layers, and tables."""
    layouts = [LayerLayout(8, 128, 128, 0, heads=32)] * 8
    short, long = (kv_nbytes("lighttransfer", layouts, context, 1, "bfloat16") for context in (8192, 16384))
    full = kv_nbytes("none", [LayerLayout(8, 128, 128, 8192, heads=32)] * 8, 8192, 1, "bfloat16")
    numbers = (8 + 4) * 8 * 4 * 8192 // PAGE  # of pages: in the tables of all layers, and free ones
    assert long - short == full // 2 + numbers


def test_layers_that_others_read_cannot_be_lazy() -> None:
    with pytest.raises(UsageError, match="lighttransfer does not go with kvsharer"):
        compose("lighttransfer+kvsharer")
