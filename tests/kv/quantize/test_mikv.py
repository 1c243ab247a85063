"""What an eviction policy would let go of is still there in few bits."""

from __future__ import annotations

import pytest
import torch
from tests.kv.driver import Layer

from tightfit.errors import UsageError
from tightfit.kernels import cpu
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.make import kv_nbytes

LAYOUT = LayerLayout(2, 64, 64, 0, heads=4)
CONTEXT, NEEDLE = 512, 70


def haystack(outlying: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of 480 tokens, of which one has a key that no query but the last looks for. Some
    channels of keys are ``outlying``."""
    torch.manual_seed(0)
    q, k, v = torch.randn(480, 4, 64), torch.randn(480, 2, 64), torch.randn(480, 2, 64)
    k[..., :4] *= outlying
    q[..., :4] /= outlying
    q[:-1] -= 4 * torch.nn.functional.normalize(k[NEEDLE], dim=-1).repeat_interleave(2, 0)
    q[-1] = k[NEEDLE].repeat_interleave(2, 0) * torch.where(torch.arange(64) < 4, outlying**-2, 1.0)
    return q, k, v


def last_output(kv: str, tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, Layer]:
    """What the last token sees, after the others were a prompt in two chunks."""
    layer = Layer(kv, LAYOUT, CONTEXT)
    for a, b in ((0, 256), (256, 479)):
        layer.add(*(x[a:b] for x in tokens))
    return layer.add(*(x[479:] for x in tokens), decode=True)[0], layer


def error(kv: str, outlying: float = 1.0) -> float:
    tokens = haystack(outlying)
    expected = last_output("int8(recent=500)", tokens)[0]  # codes nothing
    return float((last_output(kv, tokens)[0] - expected).norm() / expected.norm())


def reserved(kv: str) -> int:
    return kv_nbytes(kv, [LAYOUT], CONTEXT, 1, "float32")


def test_at_equal_bytes_it_sees_what_eviction_lost() -> None:
    mixed, evicted = "mikv(keep=64)", "h2o(keep=160)"
    assert reserved(mixed) <= reserved(evicted)
    assert error(evicted) > 0.9  # the needle is gone
    assert error(mixed) < 0.5
    assert error("mikv(keep=64,bits=8)") < 0.01


def test_every_token_is_in_one_of_the_stores() -> None:
    tokens = haystack()
    layer = last_output("mikv(keep=64)", tokens)[1]
    below = layer.cache.store.lower[0]
    assert below is not None
    for head in range(2):
        coded, above = int(below.pages.lengths[0, head]), layer.length(head)
        assert coded + above == 480
        assert coded >= 480 - 64 - 32
    assert (below.pages.key_codec.bits, below.pages.value_codec.bits) == (2, 2)


def test_balancing_keeps_outlying_channels_from_hiding_the_others() -> None:
    """Without it a channel that is 30 times as large leaves the others of its group one code."""
    calm, outlying = error("mikv(keep=64,bits=4)"), error("mikv(keep=64,bits=4)", outlying=30.0)
    assert outlying < 2 * calm
    tokens = haystack(30.0)
    layer = last_output("mikv(keep=64,bits=4)", tokens)[1]
    below = layer.cache.store.lower[0]
    assert below is not None
    assert below.pages.key_side is not None
    q, k, _ = (x[:256] for x in tokens)
    largest_q = q[-128:].abs().amax(0).view(2, 2, 64).amax(1)
    expected = (k.abs().amax(0) / largest_q).sqrt()
    assert torch.allclose(below.pages.key_side[0, :, 64:], expected, rtol=1e-5)


def test_important_tokens_are_as_they_are_or_in_the_bits_of_another_method() -> None:
    tokens = haystack()
    kept = last_output("mikv(keep=64)", tokens)[1]
    for head in range(2):
        positions = kept.positions(head)
        assert torch.equal(kept.read(head)[0], tokens[1][positions, head])
    coded = last_output("mikv(keep=192)+int4(recent=0)", tokens)[1]
    assert coded.pages.coded.min() > 0
    assert reserved("mikv(keep=192)+int4(recent=0)") < reserved("mikv(keep=192)")


def test_settings_that_make_no_sense_are_refused() -> None:
    for kv in ("mikv(bits=3)", "mikv(recent=2)", "mikv(keep=0)"):
        with pytest.raises(UsageError):
            compose(kv)


def test_the_compiled_kernels_store_what_the_reference_stores() -> None:
    stored = []
    chosen = cpu.features()["chosen"]
    for level in (chosen, cpu.REFERENCE):
        cpu.use(level)
        layer = Layer("mikv(keep=64)", LAYOUT, CONTEXT)
        layer.add(*(x[:100] for x in haystack()))
        below = layer.cache.store.lower[0]
        assert below is not None
        stored.append((below.pages.lengths.clone(), below.pages.coded.clone()))
    cpu.use(chosen)
    assert torch.equal(stored[0][0], stored[1][0])
    assert torch.equal(stored[0][1], stored[1][1])
