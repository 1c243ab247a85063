"""Projections of which any number of first features can be used: trained, ordered, and searched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tests.kv.driver import ROOM, Tiny

from tightfit.budget.ledger import Arena, Workspace
from tightfit.engine.engine import Engine
from tightfit.engine.fit import Observing
from tightfit.errors import BudgetError, UsageError
from tightfit.kv.base import LayerLayout
from tightfit.kv.cache import Cache
from tightfit.kv.fitted import Findings, Known
from tightfit.kv.lowrank.bases import Moments, rotation
from tightfit.kv.lowrank.matryoshka import PARTS, Matryoshka, step_of
from tightfit.kv.lowrank.nested import Nested, search
from tightfit.model.decoder import cache_layouts

CONTEXT = 256


def observed(tiny: Tiny, budget: int = ROOM) -> Observing:
    """The model with texts of 48 tokens."""
    cache = Cache(cache_layouts(tiny.spec, 48, 48), 1, tiny.dtype, Arena(ROOM), tiny.dtype, 48)
    engine = Engine(tiny.decoder, cache, Workspace(Arena(ROOM)), 48, 48, 1)
    return Observing(engine, "tiny", tiny.tokens(1024, seed=9), tiny.encode, budget)


@pytest.fixture(scope="module")
def found(tiny: Callable[..., Tiny]) -> Findings:
    return Matryoshka(steps=4).fit(observed(tiny("llama")), lambda done, total: None)


def test_principal_components_say_most_with_fewest() -> None:
    """Of vectors in a plane of a space two are enough, and one says more than any other direction."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(6, 2, generator=generator))[0]
    x = torch.randn(500, 1, 2, generator=generator) * torch.tensor([3.0, 1.0]) @ plane.T + 5.0
    moments = Moments(1, 6)
    for part in x.split(100):
        moments.add(part)
    basis = moments.principal(centered=True)
    centred = x[:, 0] - moments.mean()
    torch.testing.assert_close(basis[0].T @ basis[0], torch.eye(6))
    torch.testing.assert_close(centred @ basis[0, :, :2] @ basis[0, :, :2].T, centred, rtol=1e-4, atol=1e-4)
    first = (centred @ basis[0]).square().sum(0)
    assert (first.diff() <= 1e-3).all()
    assert torch.equal(basis[0], moments.principal(centered=True)[0])
    assert moments.share(moments.principal(centered=False)[:, :, :2]) < 1.0 <= 1.0001 * moments.share(basis)


def test_what_is_trained_stays_orthogonal(found: Findings) -> None:
    for name, matrices in found.tensors.items():
        if name.startswith(("keys", "values")):
            wanted = torch.eye(matrices.shape[2]).expand_as(matrices)
            torch.testing.assert_close(matrices.mT @ matrices, wanted, rtol=0, atol=1e-4)
    x = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rotation(torch.zeros(5, 5)), torch.eye(5))
    torch.testing.assert_close(rotation(x) @ rotation(x).mT, torch.eye(5).expand(3, 5, 5), rtol=0, atol=1e-5)


def test_one_file_serves_every_share_and_smaller_ones_are_parts_of_larger_ones(
    tiny: Callable[..., Tiny], found: Findings
) -> None:
    layouts = cache_layouts(tiny("llama").spec, CONTEXT, 64)
    shares = (0.25, 0.4, 0.5, 0.8, 1.0)
    methods = [Matryoshka(share=share, steps=4) for share in shares]
    assert len({method.fitted_by() for method in methods}) == 1
    assert Matryoshka(steps=5).fitted_by() != methods[0].fitted_by()
    made = [method.maps(layouts, found.tensors) for method in methods]
    for fewer, more in pairwise(made):
        for one, other in zip(fewer, more, strict=True):
            for few, many in ((one.keys, other.keys), (one.values, other.values)):
                assert torch.equal(few, many[:, :, : few.shape[2]])
    total = sum(layout.kv_heads * (layout.key_dim + layout.value_dim) for layout in layouts)
    largest = max(layout.kv_heads * step_of(layout.key_dim) for layout in layouts)
    for share, maps in zip(shares, made, strict=True):
        kept = sum(each.keys.shape[0] * (each.keys.shape[2] + each.values.shape[2]) for each in maps)
        assert share * total - largest < kept <= share * total


def test_layers_keys_and_values_have_ranks_of_their_own(tiny: Callable[..., Tiny], found: Findings) -> None:
    layouts = cache_layouts(tiny("llama").spec, CONTEXT, 64)
    ranks = Matryoshka(share=0.5, steps=4).ranks(layouts, found.tensors["order"].tolist())
    assert len({rank for both in ranks for rank in both}) > 1
    everything = Matryoshka(share=1 / PARTS, steps=4).ranks(layouts, found.tensors["order"].tolist())
    assert set(everything) == {(step_of(40), step_of(40))}


def divergence(network: object, nested: Nested, tokens: torch.Tensor, cut: list[tuple[torch.Tensor, ...]]) -> float:
    with torch.no_grad():
        exact, other = (
            network.logits(network.hidden(tokens, *attend)).log_softmax(-1)  # type: ignore[attr-defined]
            for attend in ((), (nested.attend(network, cut),))  # type: ignore[arg-type]
        )
        return float((exact.exp() * (exact - other)).sum(-1).mean())


def loud(layouts: list[LayerLayout]) -> Nested:
    """Bases that begin with directions that say nothing: as principal components do where keys vary most in what no
    query asks for."""
    eyes = [torch.eye(layout.key_dim).expand(layout.kv_heads, -1, -1).clone() for layout in layouts]
    means = [torch.zeros(layout.kv_heads, layout.value_dim) for layout in layouts]
    return Nested(layouts, eyes, eyes, means)


def test_training_finds_what_variance_does_not_say(tiny: Callable[..., Tiny]) -> None:
    """The same ranks diverge less after training, of texts that were not trained with."""
    small = tiny("llama")
    network, layouts = observed(small).network(), cache_layouts(small.spec, CONTEXT, 64)
    nested, generator = loud(layouts), torch.Generator().manual_seed(0)
    tokens = torch.tensor([small.tokens(48, seed=30 + index) for index in range(20)])

    def at(rank: int) -> float:
        with torch.no_grad():
            both = [nested.matrices(layer) for layer in range(len(layouts))]
        cut = [(keys[:, :, :rank], values[:, :, :rank]) for keys, values in both]
        return divergence(network, nested, tokens[16:], cut)

    ranks = (10, 20)
    before = [at(rank) for rank in ranks]
    for step in range(60):
        nested.train(network, tokens[step % 4 * 4 : step % 4 * 4 + 4], generator, 1 - step / 60)
    assert all(now < 0.9 * then for now, then in zip([at(rank) for rank in ranks], before, strict=True))


def test_what_says_least_is_let_go_of_first(tiny: Callable[..., Tiny]) -> None:
    """A layer whose keys are all in their first features loses the others before anything else."""
    small = tiny("llama")
    network, layouts = observed(small).network(), cache_layouts(small.spec, CONTEXT, 64)
    nested = loud(layouts)

    class Short:
        """Keys of the second layer say nothing beyond their first ten features."""

        def hidden(self, tokens: torch.Tensor, attend: object = None) -> torch.Tensor:
            inner = attend or network.attention

            def short(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                k = k * (torch.arange(k.shape[-1]) < 10) if layer == 1 else k
                return inner(layer, q, k, v)  # type: ignore[operator, no-any-return]

            return network.hidden(tokens, short)

        attention = staticmethod(network.attention)

    with torch.no_grad():
        order = search(nested, Short(), torch.tensor([small.tokens(40)]), lambda gone: None)  # type: ignore[arg-type]
    keys_of_second = 2
    assert [at for at, each in enumerate(order) if each == keys_of_second][:6] == list(range(6))
    assert sorted(order) == sorted([each for each in range(6) for _ in range(PARTS - 1)])


def test_projected_it_is_what_the_network_predicts(tiny: Callable[..., Tiny], found: Findings) -> None:
    """The cache computes what was trained: attention over projected keys and values, means of values included."""
    small = tiny("llama")
    method = Matryoshka(share=0.5, steps=4)
    run = small.run(
        "matryoshka(share=0.5,steps=4)", context=CONTEXT, known=Known(tensors={"matryoshka": found.tensors})
    )
    tokens = small.tokens(100)
    network, layouts = observed(small).network(), cache_layouts(small.spec, CONTEXT, 64)
    ranks = method.ranks(layouts, found.tensors["order"].tolist())
    cut = [
        (found.tensors[f"keys.{layer}"][:, :, :keys], found.tensors[f"values.{layer}"][:, :, :values])
        for layer, (keys, values) in enumerate(ranks)
    ]
    nested = loud(layouts)
    nested.means = [found.tensors[f"means.{layer}"] for layer in range(len(layouts))]
    with torch.no_grad():
        hidden = network.hidden(torch.tensor([tokens]), nested.attend(network, cut))
        wanted = network.logits(hidden)[0, -1]
    torch.testing.assert_close(run.prefill(tokens), wanted, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_fitted_is_refused(tiny: Callable[..., Tiny]) -> None:
    with pytest.raises(BudgetError, match="budget leaves"):
        Matryoshka(steps=1).fit(observed(tiny("llama"), budget=1 << 20), lambda done, total: None)
    with pytest.raises(UsageError, match="latent"):
        tiny("latent").run("matryoshka", context=CONTEXT)
    for wrong in ({"share": 0.1}, {"share": 1.5}, {"steps": -1}):
        with pytest.raises(UsageError, match="matryoshka cannot"):
            replace(Matryoshka(), **wrong)
