"""less keeps what was evicted in a state of constant size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.kv.driver import Tiny
from tests.kv.merge.layer import DIM, HEADS, VALUES, Driver, tokens
from torch.nn.functional import gelu

from tightfit.errors import UsageError
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.fitted import Known
from tightfit.kv.merge.lowrank_state import Kernels, Texts, heavy_hitters

QUERIES, RANK, HIDDEN = 2 * HEADS, 4, 6  # two query heads to a key-value head
GROUPED = LayerLayout(HEADS, DIM, VALUES, 512, heads=QUERIES)
LESS = f"less(rank={RANK},hidden={HIDDEN})"


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    torch.manual_seed(0)
    found = Kernels(QUERIES, HEADS, DIM, HIDDEN, RANK)
    with torch.no_grad():
        found.gain.fill_(0.3)
        found.mixed.fill_(0.5)
    return found.eval()


def known(kernels: Kernels) -> Known:
    return Known(tensors={"less": {f"0.{name}": tensor for name, tensor in kernels.found().items()}})


def formula(kernels: Kernels, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: set[int]) -> torch.Tensor:
    """Attention of one query (dim,) of head 0 over keys and values (n, dim): as they are, or by their kernels."""
    score = torch.exp(k @ q)
    phi = gelu(gelu(q @ kernels.q_first[0]) @ kernels.q_second[0]).abs()
    inner = kernels.gain[0].abs() * gelu(gelu(k @ kernels.k_first[0]) @ kernels.k_second[0])
    psi = (inner + (inner @ kernels.mix[0]) * kernels.mixed[0]).abs()
    whole = torch.where(torch.tensor([place in kept for place in range(len(k))]), score, psi @ phi)
    return whole @ v / whole.sum()


@torch.no_grad()
@pytest.mark.parametrize("evictor", ["h2o(keep=20)", "snapkv(keep=20,window=8)", "tova(keep=20)"])
def test_the_state_gives_what_the_formula_gives(kernels: Kernels, evictor: str) -> None:
    """Whichever method let go of tokens, and when: in chunks of a prompt or while decoding, each still counts by the
    kernels; without the state it does not."""
    driver = Driver(f"{LESS}+{evictor}", GROUPED, known=known(kernels))
    q, k, v = (x[:150] for x in tokens(150))
    q = torch.randn(150, QUERIES, DIM, generator=torch.Generator().manual_seed(5))
    driver.add(q[:70], k[:70], v[:70])
    driver.add(q[70:97], k[70:97], v[70:97])
    for place in range(97, 150):
        kept = {*driver.kept(0), place}
        out = driver.add(q[place : place + 1], k[place : place + 1], v[place : place + 1], decode=True)
        wanted = formula(kernels, q[place, 0], k[: place + 1, 0], v[: place + 1, 0], kept)
        torch.testing.assert_close(out[0, 0], wanted, rtol=1e-3, atol=1e-4)
        driver.commit(1)
    everything = set(range(150))
    assert not torch.allclose(out[0, 0], formula(kernels, q[149, 0], k[:, 0], v[:, 0], everything), rtol=1e-2)


def test_the_state_is_as_large_for_any_context(kernels: Kernels) -> None:
    more = [
        Driver(f"{LESS}+h2o(keep=40)", GROUPED, known=known(kernels), context=context).bytes
        - Driver("h2o(keep=40)", GROUPED, context=context).bytes
        for context in (128, 4096)
    ]
    state = 4 * HEADS * RANK * (1 + VALUES)
    weights = sum(tensor.nbytes for tensor in kernels.found().values())
    assert more[0] == more[1]
    assert state + weights <= more[0] <= state + weights + 6 * 64


def test_heavy_hitters_are_those_of_h2o() -> None:
    """Token by token: recent ones, and those that received most while they were there."""
    torch.manual_seed(0)
    weights = torch.randn(1, 1, 30, 30).masked_fill(torch.ones(30, 30).triu(1).bool(), -torch.inf).softmax(-1)
    seen, mass, there = heavy_hitters(weights, 8)[0, 0], torch.zeros(30), list(range(8))
    for at in range(30):
        if at >= 8:
            old = sorted((p for p in there if p < at - 4), key=lambda p: -mass[p])[:4]
            there = [*sorted(old), *range(at - 4, at + 1)]
        assert seen[at].nonzero()[:, 0].tolist() == [p for p in there if p <= at]
        mass += weights[0, 0, at]
        mass[[p for p in range(30) if p not in there]] = 0.0


def test_the_error_that_is_trained_is_that_of_the_formula(kernels: Kernels) -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(1, QUERIES, 40, DIM), torch.randn(1, HEADS, 40, DIM), torch.randn(1, HEADS, 40, VALUES)
    texts = Texts(q, k, v, 1.0, torch.eye(QUERIES * VALUES), 10)
    with torch.no_grad():
        without, error = (float(texts.error(each, torch.arange(1))) for each in (None, kernels))
        seen = texts.gone[0, 0, 39] == 0
        found = formula(kernels, q[0, 0, 39], k[0, 0], v[0, 0], set(seen.nonzero()[:, 0].tolist()))
        rest = kernels.scores(q, k)[0, 0, 39] * texts.gone[0, 0, 39]
    scores = torch.where(seen, (k[0, 0] @ q[0, 0, 39]).exp(), rest)
    torch.testing.assert_close(found, scores @ v[0, 0] / scores.sum(), rtol=1e-4, atol=1e-5)
    assert without > 0
    assert error > 0


def test_what_is_trained_makes_a_smaller_error_than_eviction_alone(tiny: Callable[..., Tiny]) -> None:
    """In every layer, on a text that it was not trained on."""
    report = tiny("llama").findings("less(rank=4,hidden=16)").report
    for without, error in zip(report["h2o"], report["less"], strict=True):
        assert error < 0.9 * without  # 40 steps with one text


def test_what_it_does_not_go_with_is_said(tiny: Callable[..., Tiny]) -> None:
    with pytest.raises(UsageError, match="less does not go with d2o"):
        compose("less+d2o")
    for kv in ("less(rank=0)", "less(keep=1)"):
        with pytest.raises(UsageError):
            compose(kv)
    for layout in (LayerLayout(2, 8, 6, 64, window=20), LayerLayout(1, 8, 6, 64, shared=True)):
        with pytest.raises(UsageError, match="this model cannot use less"):
            compose("less").check([layout])
    with pytest.raises(UsageError, match="this model cannot use less: tokens that a window hides"):
        tiny("sliding").findings("less(rank=4,hidden=16)")  # before anything is trained
