"""lococo fuses what is let go of into slots, by convolutions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kv.driver import Tiny
from tests.kv.merge.layer import DIM, HEADS, LAYOUT, VALUES, Driver, Kept, assert_same, tokens
from torch.nn.functional import conv1d

from tightfit.errors import UsageError
from tightfit.kernels.attention import Scoring
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.fitted import Attend, Known
from tightfit.kv.merge.convolutions import HALO, Compressed, Convolutions, Training

SLOTS = 7


@pytest.fixture(scope="module")
def layer() -> Convolutions:
    torch.manual_seed(0)
    found = Convolutions(LAYOUT, SLOTS)
    with torch.no_grad():
        found.bias.normal_()
        found.mix.fill_(0.4)
    return found


def known(layer: Convolutions) -> Known:
    return Known(tensors={"lococo": {f"0.{name}": tensor for name, tensor in layer.found().items()}})


def fused(layer: Convolutions, there: Kept, stays: Kept) -> Kept:
    """What a head keeps, by the formulas: those of ``there`` that are let go of come into those that ``stays`` says
    are not as they were."""
    if stays.keys() == there.keys():
        return dict(there)
    slots = [position for position in stays if not torch.equal(stays[position][0], there[position][0])]
    assert len(slots) == SLOTS
    others = [position for position in there if position in slots or position not in stays]
    x = torch.stack([torch.cat(there[position]) for position in others])
    weights = conv1d(x.T[None], layer.taps, layer.bias, padding=HALO)[0].relu().softmax(-1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(SLOTS))
    wanted = {position: there[position] for position in stays}
    for position, weight in zip(slots, weights, strict=True):
        mixed = 0.6 * torch.cat(there[position]) + 0.4 * (weight @ x)
        wanted[position] = mixed[:DIM], mixed[DIM:]
    return wanted


@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 70) | st.integers(300, 330), min_size=1, max_size=3),
    decoded=st.integers(0, 70),
    keep=st.integers(2 * SLOTS, 40),
)
def test_slots_are_what_the_convolution_of_all_others_gives(
    layer: Convolutions, chunks: list[int], decoded: int, keep: int
) -> None:
    """As many slots as ever, whatever came and however long, in prompts and while decoding; the weights of each sum up
    to 1, and other tokens stay as they are."""
    driver = Driver(f"lococo(keep={keep},slots={SLOTS})", known=known(layer), context=1024)
    wanted = [Kept() for _ in range(HEADS)]
    for index, count in enumerate([*chunks, *[1] * decoded]):
        q, k, v = tokens(count, index)
        start, decode = driver.start, index >= len(chunks)
        driver.add(q, k, v, decode)
        if decode:
            driver.commit(1)
        for head in range(HEADS):
            wanted[head] |= {start + i: (k[i, head], v[i, head]) for i in range(count)}
            if not decode or driver.start % 32 == 0:
                found = driver.kept(head)
                assert len(found) == min(keep, len(wanted[head]))
                assert_same(found, fused(layer, wanted[head], found))
                wanted[head] = found


@torch.no_grad()
def test_heavy_tokens_stay_to_the_bit(layer: Convolutions) -> None:
    """Those that are looked at and the last ones; what is looked at next becomes slots, and nothing else is left."""
    q, k, v = tokens(200)
    q[:] = 1.0
    k.mul_(0.01)
    k[[9, 60, 131]] += 2.0
    k[20 : 20 + SLOTS] += 1.0
    driver = Driver(f"lococo(keep={SLOTS + 13},slots={SLOTS},recent=0.5)", known=known(layer))
    driver.add(q, k, v)
    for head in range(HEADS):
        kept = driver.kept(head)
        assert list(kept) == [9, *range(20, 20 + SLOTS), 60, 131, *range(190, 200)]
        for position, (key, value) in kept.items():
            same = torch.equal(key, k[position, head]) and torch.equal(value, v[position, head])
            assert same == (position not in range(20, 20 + SLOTS))


@torch.no_grad()
@pytest.mark.parametrize("count", [40, 64])
def test_training_sees_what_the_cache_does(layer: Convolutions, count: int) -> None:
    """The attention through which gradients flow is that of the cache."""
    driver = Driver(f"lococo(keep=24,slots={SLOTS},window=32,recent=0.25)", known=known(layer))
    q, k, v = tokens(4 * count)
    out = [driver.add(*(x[at : at + count] for x in (q, k, v))) for at in range(0, len(q), count)]
    attend = Compressed([layer], [Scoring(1.0)], 24, 6, 32, count)
    torch.testing.assert_close(torch.cat(out), attend(0, q[None], k[None], v[None])[0], rtol=1e-3, atol=1e-4)


def test_memory_is_the_same_for_any_context(layer: Convolutions) -> None:
    small, large = (
        Driver(f"lococo(keep=24,slots={SLOTS},window=12)", known=known(layer), context=context).bytes
        for context in (64, 4096)
    )
    plain = Driver("snapkv(keep=24,window=12)").bytes
    assert small == large
    assert 0 <= small - plain - sum(x.nbytes for x in layer.found().values()) <= 8 * 64


class Asking:
    """A network of one layer where token 0 asks for tokens 1 to 5, which nobody looked at before, and predicts by
    them. The others give nothing."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.q, self.k = torch.zeros(2, 20, 1, DIM)
        self.k[:] = 0.3 * torch.randn(20, 1, DIM, generator=generator)
        self.q[0, :, 0], self.k[:, :, 0], self.k[1:6, :, 0] = 1.0, 0.0, 8.0
        self.v = torch.zeros(20, 1, VALUES)
        self.v[1:6] = torch.randn(5, 1, VALUES, generator=generator)

    def hidden(self, tokens: torch.Tensor, attend: Attend | None = None) -> torch.Tensor:
        return (attend or self.attention)(0, self.q[tokens], self.k[tokens], self.v[tokens]).flatten(2)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return 5 * hidden

    def attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k)
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
        return torch.einsum("bhnm,bmhd->bnhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def test_what_is_fitted_keeps_what_dropping_loses() -> None:
    """What tokens are worth cannot be seen by the attention that they received, and is learned from others."""
    torch.manual_seed(2)
    layout = LayerLayout(1, DIM, VALUES, 512, heads=1)
    training = Training(Asking(), [layout], [Scoring(1.0)], 8, 4, 8)
    texts = torch.randint(6, 20, (20, 96))
    texts[:, 20:60:12] = torch.randint(1, 6, (20, 1))
    texts[:, 80:] = 0
    unseen, learned = texts[:6], texts[6:]
    dropped, untrained = (training.held_out(unseen, (16, 32), mix) for mix in (0.0, None))
    for step in range(120):
        training.step(learned, (16, 32)[step % 2], 1.0)
    trained = training.held_out(unseen, (16, 32))
    assert trained < 0.5 * untrained
    assert trained < 0.5 * dropped


def test_fitting_a_model_makes_it_better(tiny: Callable[..., Tiny]) -> None:
    report = tiny("llama").findings("lococo(keep=32,slots=16,window=16,steps=20)").report
    assert report["trained"] < 0.9 * report["untrained"]


def test_what_it_does_not_go_with_is_said(tiny: Callable[..., Tiny]) -> None:
    for kv in ("lococo(slots=0)", "lococo(steps=-1)", "lococo(keep=0.5)", "lococo(recent=0.6)", "lococo(budget=adakv)"):
        with pytest.raises(UsageError):
            compose(kv)
    for layout in (LayerLayout(2, 8, 6, 64, window=20), LayerLayout(1, 8, 6, 64, shared=True)):
        with pytest.raises(UsageError, match="this model cannot use lococo"):
            compose("lococo").check([layout])
    with pytest.raises(UsageError, match="this model cannot use lococo: tokens that a window hides"):
        tiny("sliding").findings("lococo(keep=32,slots=16)")
