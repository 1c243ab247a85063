"""Tokens in a lower store are still seen: where it keeps them as they are nothing is lost, however it is computed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tests.kv.driver import Layer, Tiny, choose

from tightfit.kernels import ops
from tightfit.kernels.codec import Codec
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import Composition, compose
from tightfit.kv.method import Demoter, Method, Seen

PROMPT, DECODED, CHUNK, CONTEXT = 150, 72, 48, 256


@dataclass(frozen=True)
class Demote(Demoter):
    """A lower store of tokens as they are, of those that least attention went to."""

    features: int = 0  # that keys and values have there; 0: all
    bits: int = 0

    name: ClassVar[str] = "demote"
    observes: ClassVar[str] = "all"

    def scores(self, seen: Seen) -> torch.Tensor:
        return seen.mass

    def lower(self, layout: LayerLayout, as_they_are: int) -> tuple[Codec, Codec]:
        bits = self.bits or as_they_are
        keys, values = (self.features or dim for dim in (layout.key_dim, layout.value_dim))
        return Codec(bits, keys, per_channel=True), Codec(bits, values, per_channel=False)


DEMOTERS = [Demote(keep=40), Demote(keep=0.3, budget="adakv"), Demote(keep=48, budget="pyramid")]
OTHERS = ["", "host(resident=32)", "quest(tokens=512,full=0)"]


def composed(demoter: Demote, others: str = "") -> Composition:
    methods: tuple[Method, ...] = compose(others).methods if others else ()
    return Composition((demoter, *methods))


def check_sees_everything(tiny: Tiny, composition: Composition, layered: bool = False) -> None:
    run, full = (tiny.run(kv, context=CONTEXT, chunk=CHUNK) for kv in (composition, "none"))
    prompt = tiny.tokens(PROMPT)
    found, expected = (each.prefill(prompt, layered=layered) for each in (run, full))
    for position in range(PROMPT, PROMPT + DECODED):
        assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max()))
        token = choose(expected, position)
        found, expected = run.decode(token), full.decode(token)
    for lower in run.paged.store.lower:
        assert lower is None or (lower.pages.lengths > 0).all()


@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("demoter", DEMOTERS)
def test_a_lower_store_of_tokens_as_they_are_loses_nothing(
    tiny: Callable[..., Tiny], demoter: Demote, layered: bool
) -> None:
    check_sees_everything(tiny("llama"), composed(demoter), layered)


@pytest.mark.parametrize("others", OTHERS[1:])
def test_with_other_methods_it_loses_nothing_either(tiny: Callable[..., Tiny], others: str) -> None:
    check_sees_everything(tiny("llama"), composed(DEMOTERS[0], others))


@pytest.mark.parametrize("model", ["sliding", "latent"])
def test_windows_are_kept_whole_and_latents_are_demoted(tiny: Callable[..., Tiny], model: str) -> None:
    check_sees_everything(tiny(model), composed(DEMOTERS[0]))


@pytest.mark.parametrize("others", OTHERS)
def test_drafts_that_are_refused_leave_no_trace_below(tiny: Callable[..., Tiny], others: str) -> None:
    tail = 12
    composition = composed(Demote(keep=48, bits=4, budget="adakv"), others)
    model = tiny("llama")
    plain, drafted = (model.run(composition, context=CONTEXT, chunk=CHUNK, tail=n) for n in (1, tail))
    prompt, rng = model.tokens(PROMPT), random.Random(0)
    first, logits = plain.prefill(prompt), drafted.prefill(prompt)
    right, after = plain.generate(first, DECODED)
    done = 0
    while done < DECODED:
        size = min(rng.randint(1, tail), DECODED - done, drafted.cache.room(0))
        kept = rng.randint(0, size)
        tokens = [*right[done : done + kept], *model.tokens(size - kept, seed=done)]
        parents = [index - 1 for index in range(size)]
        logits = drafted.verify(tokens, parents)
        assert all(torch.equal(logits[i], after[done + i]) for i in range(kept))
        drafted.commit(range(kept))
        done += kept


@pytest.mark.parametrize("others", OTHERS)
def test_what_is_saved_goes_on_with_the_same_bits(tiny: Callable[..., Tiny], others: str) -> None:
    model, composition = tiny("llama"), composed(Demote(keep=48, bits=2), others)
    first, second = (model.run(composition, context=CONTEXT, chunk=CHUNK) for _ in range(2))
    logits = first.prefill(model.tokens(PROMPT))
    parts: list[torch.Tensor] = []
    first.cache.save(0, 0, PROMPT, lambda part: parts.append(part.clone()))
    assert sum(part.nbytes for part in parts) == first.cache.entry_nbytes(0, 0, PROMPT)
    saved = iter(parts)
    second.cache.restore(0, 0, PROMPT, lambda part: part.copy_(next(saved)))  # type: ignore[arg-type, return-value]
    second.lengths[0] = PROMPT
    for mine, theirs in zip(first.generate(logits, 40)[1], second.generate(logits, 40)[1], strict=True):
        assert torch.equal(mine, theirs)


def test_a_dry_run_takes_the_scratch_of_the_worst_step(tiny: Callable[..., Tiny]) -> None:
    model = tiny("llama")
    real, dry = (model.run(composed(Demote(keep=40, bits=2)), context=CONTEXT, chunk=CHUNK) for _ in range(2))
    logits = real.prefill(model.tokens(PROMPT))
    real.generate(logits, DECODED)
    with ops.dry():
        dry.prefill(model.tokens(CHUNK))
        dry.decode(0)
    assert real.ws.high_water <= dry.ws.high_water


def test_features_that_are_projected_without_loss_lose_nothing() -> None:
    """Keys and values that lie in a plane of 8 of 24 features."""
    torch.manual_seed(0)
    layout, n = LayerLayout(2, 24, 24, 0, heads=4), 100
    planes = [torch.linalg.qr(torch.randn(2, 24, 8)).Q for _ in range(2)]
    k, v = (torch.randn(n, 2, 1, 8) @ plane.mT for plane in planes)
    q, tokens = torch.randn(n, 4, 24), (k[:, :, 0], v[:, :, 0])
    outs = []
    for composition in (composed(Demote(keep=20, features=8)), composed(Demote(keep=20))):
        layer = Layer(composition, layout)
        lower = layer.cache.store.lower[0]
        assert lower is not None
        if lower.projected:
            for matrices, plane in ((lower.to_keys, 0), (lower.to_queries, 0), (lower.to_values, 1)):
                matrices.copy_(planes[plane])
            lower.from_values.copy_(planes[1].mT)
        parts = [layer.add(q[at:stop], *(x[at:stop] for x in tokens)) for at, stop in ((0, 40), (40, 70))]
        outs.append(torch.cat([*parts, layer.add(q[70:], *(x[70:] for x in tokens), decode=True)]))
    assert torch.allclose(*outs, atol=1e-5)
