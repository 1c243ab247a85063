"""Channels that depend on each other cost fewer bits together than apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.kv.driver import Tiny

from tightfit.errors import UsageError
from tightfit.kernels.codec import PAGE, Codec
from tightfit.kernels.pages_reference import decode, encode
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.make import kv_nbytes
from tightfit.kv.quantize.cq import CQ, centroids

TOKENS, DIM = 2048, 16


def dependent(strength: float) -> torch.Tensor:
    """Numbers (1, tokens, dim) whose neighbouring channels follow one another."""
    torch.manual_seed(0)
    common = torch.randn(1, TOKENS, DIM // 4).repeat_interleave(4, 2)
    return strength * common + (1 - strength**2) ** 0.5 * torch.randn(1, TOKENS, DIM)


def missed(numbers: torch.Tensor, coupled: int, bits: int) -> float:
    """The share of the variance that codes miss, as pages hold them, at ``bits / coupled`` bits a channel."""
    found, _ = centroids(numbers, coupled, bits)
    codec, side = Codec(bits, DIM, False, coupled=coupled), found[0].flatten()
    pages = numbers[0].split(PAGE)
    back = torch.cat([decode(codec, torch.float32, encode(codec, torch.float32, page, side), side) for page in pages])
    return float((back - numbers[0]).square().mean() / numbers.var())


@pytest.mark.parametrize(("coupled", "apart"), [((4, 4), (1, 1)), ((8, 8), (1, 1)), ((4, 8), (1, 2)), ((2, 8), (1, 4))])
def test_at_equal_bits_coupled_channels_are_missed_by_less(coupled: tuple[int, int], apart: tuple[int, int]) -> None:
    numbers = dependent(0.9)
    assert missed(numbers, *coupled) < 0.75 * missed(numbers, *apart)


def test_it_is_dependence_that_is_won() -> None:
    """Channels that have nothing to do with one another win little by being coupled."""
    won = [missed(x, 4, 4) / missed(x, 1, 1) for x in (dependent(0.95), dependent(0.0))]
    assert won[0] < 0.5
    assert won[1] > 0.85


def test_a_channel_takes_as_many_bits_as_are_said_and_centroids_are_counted() -> None:
    for coupled, bits in ((8, 8), (4, 8), (2, 8)):
        assert Codec(bits, 128, False, coupled=coupled).page_bytes == PAGE * 128 * bits // coupled // 8
    layouts = [LayerLayout(2, 128, 128, 0, heads=2)]
    one, two = (kv_nbytes("cq(coupled=8,recent=0)", layouts, context, 1, "bfloat16") for context in (4096, 8192))
    table = 2 * 2 * 128 * 256 * 4  # keys and values of two heads, 256 centroids in float32
    per_token = 2 * 2 * 128 // 8
    assert two - one == pytest.approx(4096 * per_token, rel=0.1)
    assert one - 4096 * per_token > table


def test_what_was_fitted_is_what_codes_name(tiny: Callable[..., Tiny]) -> None:
    small, kv = tiny("llama"), "cq(coupled=8,recent=0)"
    known = small.known(kv)
    run = small.run(kv, context=256, chunk=64, known=known)
    run.prefill(small.tokens(128))
    found = known.tensors["cq"]
    for layer, kept in enumerate(run.paged.layers):
        assert kept.key_side is not None
        assert torch.equal(kept.key_side[0], found[f"keys.{layer}"].flatten(1))
        codes = kept.coded_keys
        assert codes is not None
        dim = kept.key_codec.dim
        page = decode(kept.key_codec, torch.float32, codes[0, kept.table[0, 0, 0]], kept.key_side[0, 0])
        groups = page.view(PAGE, dim // 8, 1, 8)
        assert ((groups == found[f"keys.{layer}"][0]).all(-1).any(-1)).all()


def test_centroids_are_found_again_whatever_is_recent() -> None:
    one, other = CQ(recent=3), CQ(recent=64, of="keys")
    assert one.fitted_by() == other.fitted_by() != CQ(coupled=8).fitted_by()


def test_what_cannot_be_coupled_is_refused() -> None:
    for kv in ("cq(coupled=3)", "cq(bits=16)", "cq+think", "cq+int4"):
        with pytest.raises(UsageError):
            compose(kv)
    with pytest.raises(UsageError):
        compose("cq(coupled=8)").check([LayerLayout(1, 12, 12, 0)])
