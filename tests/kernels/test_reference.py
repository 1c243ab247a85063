"""Rows never influence each other's bits, and small operations do what their names say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tightfit.kernels import reference

ROWS = 37
WIDTHS = [1, 7, 64, 75, 2048, 5000]  # vector registers full and not, beyond the block sizes of vectorised reductions

Op = Callable[[torch.Tensor, torch.Tensor, list[tuple[int, int]]], torch.Tensor]


def rms_norm(x: torch.Tensor, y: torch.Tensor, parts: list[tuple[int, int]]) -> torch.Tensor:
    reference.rms_norm(x, y[0], 1e-6, x)
    return x


def glu(activation: str) -> Op:
    def op(x: torch.Tensor, y: torch.Tensor, parts: list[tuple[int, int]]) -> torch.Tensor:
        reference.glu(x, y, activation, x, parts)
        return x

    return op


def softcap(x: torch.Tensor, y: torch.Tensor, parts: list[tuple[int, int]]) -> torch.Tensor:
    reference.softcap_(x, 1.5, parts)
    return x


def gate(x: torch.Tensor, y: torch.Tensor, parts: list[tuple[int, int]]) -> torch.Tensor:
    reference.gate_(x, y[:, :1].contiguous(), parts)
    return x


OPS = {"rms_norm": rms_norm, "softcap": softcap, "gate": gate}
OPS |= {name: glu(name) for name in ("silu", "gelu", "gelu_pytorch_tanh", "relu", "clamped_swiglu")}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_has_the_same_bits_alone_and_among_others(name: str, width: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(ROWS, width), torch.randn(ROWS, width)
    together = OPS[name](x.clone(), y.clone(), [(row, row + 1) for row in range(ROWS)])
    y = y[:1].expand(ROWS, -1) if name == "rms_norm" else y  # one weight for all rows
    alone = torch.cat([OPS[name](x[i : i + 1].clone(), y[i : i + 1].clone(), [(0, 1)]) for i in range(ROWS)])
    assert torch.equal(together, alone)


def test_rms_norm_of_heads_has_the_same_bits_alone_and_among_others() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(ROWS, 6, 128), torch.randn(128)
    together, alone = torch.empty_like(x), torch.empty_like(x)
    reference.rms_norm(x, weight, 1e-6, together)
    for row in range(ROWS):
        reference.rms_norm(x[row : row + 1], weight, 1e-6, alone[row : row + 1])
    assert torch.equal(together, alone)


def test_rms_norm_is_its_definition() -> None:
    torch.manual_seed(0)
    x, weight, out = torch.randn(5, 33), torch.randn(33), torch.empty(5, 33)
    reference.rms_norm(x, weight, 0.1, out)
    torch.testing.assert_close(out, x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_turns_pairs_of_features_by_the_position_times_the_frequency(interleaved: bool) -> None:
    torch.manual_seed(0)
    positions, inv_freq = torch.tensor([0.0, 3.0, 40.0]), torch.tensor([1.0, 0.1])
    cos, sin = torch.empty(3, 2), torch.empty(3, 2)
    reference.rotation(positions, inv_freq, 2.0, cos, sin)
    x = torch.randn(3, 4, 6)  # of 6 features 4 are rotated
    pairs = [(0, 1), (2, 3)] if interleaved else [(0, 2), (1, 3)]
    expected = x.clone()
    for pair, (a, b) in enumerate(pairs):
        turned = torch.complex(x[..., a], x[..., b]) * torch.polar(
            torch.full((3, 1), 2.0), positions[:, None] * inv_freq[pair]
        )
        expected[..., a], expected[..., b] = turned.real, turned.imag
    reference.rotate_(x, cos, sin, interleaved, torch.empty(3, 4, 2), torch.empty(3, 4, 2))
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
