"""What few bits miss is made up for along a few directions, and outliers are exact."""

from __future__ import annotations

import pytest
import torch
from tests.kv.driver import Layer

from tightfit.errors import UsageError
from tightfit.kernels.codec import PAGE
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.make import kv_nbytes

DIM, COUNT, FAR = 64, 256, 300
LAYOUT = LayerLayout(2, DIM, DIM, 0, heads=2)


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (tokens, kv_heads, dim) in which channels move together, and a few numbers lie far off."""
    torch.manual_seed(0)
    both = []
    for _ in range(2):
        common = torch.randn(COUNT, 2, 2) @ torch.randn(2, 2, DIM).mul(3.0)[0]
        x = common + 0.3 * torch.randn(COUNT, 2, DIM)
        off = torch.rand(COUNT, 2, DIM) < 0.01
        both.append(torch.where(off, FAR * torch.randn(COUNT, 2, DIM).sign(), x))
    return both[0], both[1]


def kept(kv: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (tokens, kv_heads, dim) as attention sees them."""
    k, v = tokens()
    layer = Layer(kv, LAYOUT)
    layer.add(torch.randn(COUNT, 2, DIM), k, v)
    heads = [layer.read(head) for head in range(2)]
    assert int(layer.pages.coded.min()) == COUNT // PAGE
    keys, values = (torch.stack(each, 1) for each in zip(*heads, strict=True))
    return keys, values


def errors(kv: str) -> list[float]:
    """Of keys and of values, which share of the numbers that are not outliers is missed."""
    return [float((back - x).square().mean() / x.square().mean()) for back, x in zip(kept(kv), tokens(), strict=True)]


def test_outliers_are_exact() -> None:
    for back, x in zip(kept("gear(recent=0,outliers=0.03)"), tokens(), strict=True):
        far = x.abs() == FAR
        assert far.sum() > 100
        assert torch.equal(back[far], x[far])
    for back, x in zip(kept("int2(recent=0)"), tokens(), strict=True):
        assert not torch.equal(back[x.abs() == FAR], x[x.abs() == FAR])


def test_more_directions_miss_less() -> None:
    by_rank = [errors(f"gear(recent=0,rank={rank},outliers=0.03)") for rank in (0, 2, 8, 32)]
    for of_keys in (0, 1):
        falling = [each[of_keys] for each in by_rank]
        assert falling == sorted(falling, reverse=True)
        assert falling[-1] < 0.4 * falling[0]


def test_at_equal_bytes_it_misses_less_than_bits_alone() -> None:
    """Directions and outliers cost less than two more bits, which would go to the gap between the others and them."""
    ours, plain = "gear(recent=0,bits=2,rank=2,outliers=0.02)", "int4(recent=0)"
    assert kv_nbytes(ours, [LAYOUT], 4096, 1, "bfloat16") < kv_nbytes(plain, [LAYOUT], 4096, 1, "bfloat16")
    for mine, theirs in zip(errors(ours), errors(plain), strict=True):
        assert mine < theirs


def test_directions_are_those_of_what_codes_miss() -> None:
    k, v = tokens()
    layer = Layer("gear(recent=0,rank=3)", LAYOUT)
    layer.add(torch.randn(COUNT, 2, DIM), k, v)
    side = layer.pages.key_side
    assert side is not None
    basis = side[0].view(2, 3, DIM)
    assert torch.allclose(basis @ basis.mT, torch.eye(3).expand(2, 3, 3), atol=1e-5)


def test_settings_that_make_no_sense_are_refused() -> None:
    for kv in ("gear(bits=3)", "gear(rank=-1)", "gear(outliers=0.6)", "gear+int4"):
        with pytest.raises(UsageError):
            compose(kv)
