"""Projected keys and values: what is kept is smaller by arithmetic, and where nothing is lost nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kv.driver import Run, Tiny, choose

from tightfit.budget.ledger import Arena
from tightfit.kernels import cpu
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import Composition, compose
from tightfit.kv.fitted import Known
from tightfit.kv.lowrank.features import Features, Maps
from tightfit.kv.lowrank.projector import Projector
from tightfit.kv.make import cache_of

CONTEXT = 256


@dataclass(frozen=True)
class Turning(Projector):
    """Random orthogonal bases of each ``merged`` heads together, of which the first ``kept`` features stay; layers have
    one feature fewer each."""

    kept: int = 0  # 0: all
    merged: int = 1

    name: ClassVar[str] = "turning"

    def maps(self, layouts: Sequence[LayerLayout], tensors: Mapping[str, torch.Tensor]) -> list[Maps]:
        generator, made = torch.Generator().manual_seed(0), []
        for layer, layout in enumerate(layouts):
            bases = []
            for dim in (layout.key_dim, layout.value_dim):
                full = self.merged * dim
                random = torch.randn(layout.kv_heads // self.merged, full, full, generator=generator)
                bases.append(torch.linalg.qr(random)[0][:, :, : self.kept - layer if self.kept else full])
            outputs = bases[1].unflatten(1, (self.merged, layout.value_dim)).flatten(0, 1).mT
            made.append(Maps(bases[0], bases[1], outputs, torch.zeros(layout.kv_heads, layout.value_dim)))
        return made


def run_of(tiny: Tiny, method: Turning, others: str = "", **more: int) -> Run:
    methods = compose(others).methods if others else ()
    return tiny.run(Composition((method, *methods)), context=CONTEXT, known=Known(tensors={"turning": {}}), **more)


def check_the_same(one: Run, other: Run, layered: bool = False) -> None:
    prompt = one.tiny.tokens(150)
    found, wanted = (run.prefill(prompt, layered=layered) for run in (one, other))
    for position in range(150, 200):
        assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
        token = choose(wanted, position)
        found, wanted = one.decode(token), other.decode(token)


@pytest.mark.parametrize("merged", [1, 2])
@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("model", ["llama", "sliding"])
def test_all_features_in_another_basis_are_the_same_model(
    tiny: Callable[..., Tiny], model: str, layered: bool, merged: int
) -> None:
    check_the_same(run_of(tiny(model), Turning(merged=merged)), tiny(model).run("none", context=CONTEXT), layered)


@pytest.mark.parametrize(
    "others",
    [
        "window(keep=60)",
        "window(keep=60,positions=original,sinks=1)",
        "h2o(keep=72,recent=0.25)",
        "snapkv(keep=70,window=12,budget=adakv)+host(resident=32)",
        "d2o(keep=70,recent=0.25)",
        "quest(tokens=256,full=0)",
    ],
)
def test_what_judges_tokens_judges_them_alike_in_another_basis(tiny: Callable[..., Tiny], others: str) -> None:
    check_the_same(run_of(tiny("llama"), Turning(), others), tiny("llama").run(others, context=CONTEXT))


def test_the_references_compute_the_same(tiny: Callable[..., Tiny], monkeypatch: pytest.MonkeyPatch) -> None:
    method = Turning(kept=50, merged=2)
    wanted = run_of(tiny("llama"), method, "h2o(keep=60)").prefill(tiny("llama").tokens(100))
    monkeypatch.setattr(cpu, "available", lambda: False)
    found = run_of(tiny("llama"), method, "h2o(keep=60)").prefill(tiny("llama").tokens(100))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_layers_that_share_read_what_their_owner_projected(tiny: Callable[..., Tiny]) -> None:
    small, tensors = tiny("llama"), {"turning": {}, "kvsharer": {}}
    known = Known([0, 0, 0], tensors)
    run = small.run(Composition((Turning(kept=40), *compose("kvsharer").methods)), context=CONTEXT, known=known)
    full = small.run(Composition((Turning(), *compose("kvsharer").methods)), context=CONTEXT, known=known)
    check_the_same(full, small.run("kvsharer", context=CONTEXT, known=known))
    run.prefill(small.tokens(100))
    assert len(set(run.cache.owners)) == 1


@settings(max_examples=20, deadline=None)
@given(
    kv_heads=st.sampled_from([2, 4, 6]),
    merged=st.sampled_from([1, 2]),
    dims=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    kept=st.integers(3, 8),
    tokens=st.integers(1, 300),
)
def test_bytes_are_those_of_fewer_features_and_heads_and_of_the_matrices(
    kv_heads: int, merged: int, dims: tuple[int, int], kept: int, tokens: int
) -> None:
    layout, arena = LayerLayout(kv_heads, *dims, slots=tokens, heads=2 * kv_heads), Arena(1 << 30)
    method = Turning(kept=min(kept, *dims), merged=merged)
    [maps] = method.maps([layout], {})
    sizes = [maps.keys, maps.values, maps.outputs, *[maps.shift] * 2]
    cache = cache_of(
        Composition((method,)),
        [layout],
        tokens,
        2,
        torch.float16,
        arena,
        torch.float32,
        1,
        Known(None, {"turning": {}}),
    )
    assert isinstance(cache, Features)
    stored = 2 * 2 * tokens * (kv_heads // merged) * 2 * method.kept  # sequences, bytes of a number
    assert 0 <= arena.used - stored - 4 * sum(map(torch.numel, sizes)) < 8 * 64


def test_sequences_and_threads_leave_bits_alone(tiny: Callable[..., Tiny]) -> None:
    """A token's features are computed from its own alone."""
    small = tiny("llama")
    alone, two = (run_of(small, Turning(kept=30), sequences=n) for n in (1, 2))
    wanted = [alone.prefill(small.tokens(100))]
    first = two.prefill(small.tokens(70, seed=4), 1)
    found = [two.prefill(small.tokens(100))]
    assert torch.equal(found[0], wanted[0])
    from tightfit.model.batch import Segment

    for position in range(100, 110):
        token, other = choose(wanted[-1], position), choose(first, position)
        wanted.append(alone.decode(token))
        both = two.step(
            Segment(0, two.lengths[0], [token], decode=True), Segment(1, two.lengths[1], [other], decode=True)
        )
        for slot in (0, 1):
            two.commit([0], slot)
        found.append(both[0])
        first = both[1]
        assert torch.equal(found[-1], wanted[-1])
