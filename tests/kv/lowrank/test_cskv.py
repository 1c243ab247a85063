"""A window as it is, and few features of older tokens: those that a text says most with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.kv.driver import ROOM, Tiny

from tightfit.budget.ledger import Arena
from tightfit.errors import UsageError
from tightfit.kernels.pages import PAGE
from tightfit.kv.base import BLOCK, LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.fitted import Known
from tightfit.kv.lowrank.cskv import CSKV
from tightfit.kv.make import cache_of
from tightfit.kv.paged import PagedCache

CONTEXT = 256


def test_tokens_in_the_window_are_exact_and_older_ones_are_not(tiny: Callable[..., Tiny]) -> None:
    small = tiny("llama")
    kv = "cskv(keep=64,keys=0.1,values=0.1)"
    run, full = small.run(kv, context=CONTEXT, chunk=32, known=small.known(kv)), small.run("none", context=CONTEXT)
    tokens = small.tokens(120)
    found, wanted = run.prefill(tokens[:64]), full.prefill(tokens[:64])
    for token in tokens[64:]:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
        if run.lengths[0] == 64 + BLOCK - 1:
            break
        found, wanted = run.decode(token), full.decode(token)
    for token in tokens[64 + BLOCK - 1 : 64 + BLOCK + 1]:
        found, wanted = run.decode(token), full.decode(token)
    assert (found - wanted).abs().max() > 1e-2 * wanted.abs().max()
    for layer, lower in enumerate(run.paged.store.lower):
        assert lower is not None
        assert run.positions(layer, 0) == run.positions(layer, 1) == list(range(BLOCK, 64 + BLOCK + 1))
        assert lower.pages.lengths.tolist() == [[BLOCK]]
        assert lower.pages.key_shape == lower.pages.value_shape == (1, 8)  # a tenth of two heads of 40


@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("model", ["llama", "sliding"])
def test_all_features_of_older_tokens_are_the_exact_model(tiny: Callable[..., Tiny], model: str, layered: bool) -> None:
    small = tiny(model)
    kv = "cskv(keep=40,keys=1,values=1)"
    run, full = small.run(kv, context=CONTEXT, known=small.known(kv)), small.run("none", context=CONTEXT)
    tokens = small.tokens(200)
    found, wanted = (each.prefill(tokens[:150], layered=layered) for each in (run, full))
    for token in tokens[150:]:
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
        found, wanted = run.decode(token), full.decode(token)


def test_what_is_fitted_beats_singular_vectors_of_the_weights(tiny: Callable[..., Tiny]) -> None:
    """With as many features of values, older tokens are nearer to what they were."""
    small = tiny("llama")
    kv = "cskv(keep=2,keys=1,values=0.25)"
    fitted = small.known(kv).of(compose(kv).methods[0])
    weights = dict(fitted)
    for layer, theirs in enumerate(small.theirs.model.layers):
        out = torch.linalg.svd(theirs.self_attn.v_proj.weight.detach(), full_matrices=False)[0][:, :20]
        weights[f"values.{layer}"] = out.reshape(2, 40, 20)
    losses = [0.0, 0.0]
    for seed in range(4):
        tokens = small.tokens(150, seed=50 + seed)
        exact = small.run("none", context=CONTEXT)
        exact.prefill(tokens[:-1])
        wanted = exact.decode(tokens[-1]).log_softmax(-1)
        for index, tensors in enumerate((fitted, weights)):
            run = small.run(kv, context=CONTEXT, known=Known(tensors={"cskv": tensors}))
            run.prefill(tokens[:-1])
            losses[index] += float((wanted.exp() * (wanted - run.decode(tokens[-1]).log_softmax(-1))).sum())
    assert losses[0] < 0.9 * losses[1]


@pytest.mark.parametrize("bits", [16, 4])
def test_older_tokens_take_the_bytes_of_their_features(bits: int) -> None:
    """Of 8192 tokens more each takes its features in so many bits, and the scales of a page; 4 bytes of 32 are where it
    is."""
    layout, used = LayerLayout(4, 32, 32, slots=8192, heads=8), []
    known = Known(tensors={"cskv": {f"{kind}.0": torch.zeros(4, 32, 32) for kind in ("keys", "values")}})
    for context in (8192, 16384):
        arena = Arena(ROOM)
        composition = compose(f"cskv(keep=32,keys=0.25,values=0.25,bits={bits})")
        cache = cache_of(composition, [layout], context, 1, torch.float16, arena, torch.float32, 64, known)
        assert isinstance(cache, PagedCache)
        used.append(arena.used)
    features, pages = 4 * 32 // 4, 8192 // PAGE
    scales = 0 if bits == 16 else 4 * (features + PAGE * -(-features // 32))  # of a page of keys, and of one of values
    listed = 8  # a page's number, and one in the list of those that are free
    assert used[1] - used[0] == pages * (2 * PAGE * features * bits // 8 + scales + listed)


def test_what_it_is_fitted_by_is_what_is_kept_of_older_tokens() -> None:
    assert CSKV(keep=64, bits=4).fitted_by() == CSKV().fitted_by() != CSKV(keys=0.3).fitted_by()


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("cskv(keys=0)", "shares"),
        ("cskv(bits=3)", "bits=2, 4, 8 or 16"),
        ("cskv(budget=adakv)", "same tokens"),
        ("cskv+int4", "bits of its own"),
        ("cskv+h2o", "both for the tokens"),
    ],
)
def test_what_does_not_go_is_refused(spec: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        compose(spec)
    assert why in f"{caught.value.message} {caught.value.hint}"
