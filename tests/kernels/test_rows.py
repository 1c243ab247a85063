"""Compiled row operations give what the references do, on every instruction set, row by row."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tightfit.kernels import cpu, reference, rows

COMPILED = [name for name in cpu.supported() if name != "reference"]
EXTREMES = [0.0, -0.0, 1e-30, -1e-30, 3.0, -3.0, 80.0, -80.0, 1e4, -1e4, 1e30, -1e30]

pytestmark = pytest.mark.skipif(not COMPILED, reason="the kernels were not built")


@pytest.fixture(autouse=True, params=COMPILED, scope="module")
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.features()["chosen"]
    cpu.use(request.param)
    yield request.param
    cpu.use(before)


def gapped(*shape: int, gap: int) -> torch.Tensor:
    """Random numbers whose rows do not follow each other at once."""
    return (torch.randn(*shape[:-1], shape[-1] + gap) * 5)[..., : shape[-1]]


shapes = st.tuples(st.integers(1, 6), st.integers(1, 150), st.integers(0, 3))


@given(shapes, st.sampled_from([1, 2, 7]))
def test_rms_norm_is_the_reference(shape: tuple[int, int, int], heads: int) -> None:
    tokens, cols, gap = shape
    x, weight = gapped(tokens, heads, cols, gap=gap), torch.randn(cols)
    out, expected = gapped(tokens, heads, cols, gap=gap), torch.empty(tokens, heads, cols)
    rows.rms_norm(x, weight, 1e-5, out)
    reference.rms_norm(x, weight, 1e-5, expected)
    torch.testing.assert_close(out, expected, rtol=2e-6, atol=1e-7)
    flat = gapped(tokens, cols, gap=gap)
    rows.rms_norm(x[:, 0], weight, 1e-5, flat)
    assert torch.equal(flat, out[:, 0])


@given(shapes, st.sampled_from(rows.COMPILED_ACTIVATIONS))
def test_gated_activations_are_the_reference(shape: tuple[int, int, int], activation: str) -> None:
    tokens, cols, gap = shape
    both = gapped(tokens, 2 * cols, gap=gap)
    both[0, : len(EXTREMES)] = torch.tensor(EXTREMES)[: 2 * cols]
    gate, up = both[:, :cols], both[:, cols:]
    expected = torch.empty(tokens, cols, dtype=torch.float64)
    reference.glu(gate.double(), up.double(), activation, expected, [(0, tokens)])
    rows.glu(gate, up, activation, gate, [(0, tokens)])
    torch.testing.assert_close(gate, expected.float(), rtol=1e-5, atol=1e-6)


@given(shapes, st.sampled_from([0.5, 30.0]))
def test_softcap_is_the_reference(shape: tuple[int, int, int], cap: float) -> None:
    tokens, cols, gap = shape
    x = gapped(tokens, cols, gap=gap)
    x[0, : len(EXTREMES)] = torch.tensor(EXTREMES)[:cols]
    expected = x.clone()
    reference.softcap_(expected, cap, [(0, tokens)])
    rows.softcap_(x, cap, [(0, tokens)])
    torch.testing.assert_close(x, expected, rtol=2e-6, atol=1e-6 * cap)


@given(shapes, st.sampled_from([1.0, -0.25]), st.booleans())
def test_sums_are_the_reference(shape: tuple[int, int, int], scale: float, one_row: bool) -> None:
    tokens, cols, gap = shape
    x = gapped(tokens, cols, gap=gap)
    y = torch.randn(cols) if one_row else gapped(tokens, cols, gap=gap + 1)
    expected = x + scale * y
    rows.add_(x, y, scale)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


def test_values_that_are_not_numbers_stay_so() -> None:
    x = torch.full((1, 20), torch.nan)
    for activation in rows.COMPILED_ACTIVATIONS[:2]:
        out = torch.empty(1, 20)
        rows.glu(x, torch.ones(1, 20), activation, out, [(0, 1)])
        assert out.isnan().all()


def test_bits_depend_neither_on_other_rows_nor_on_threads() -> None:
    torch.manual_seed(0)
    x, up, weight = torch.randn(300, 700), torch.randn(300, 700), torch.randn(700)  # enough for several tasks
    results = []
    for threads in (1, 3):
        before = cpu.threads()
        cpu.set_threads(threads)
        try:
            out, gated = torch.empty_like(x), torch.empty_like(x)
            rows.rms_norm(x, weight, 1e-6, out)
            rows.glu(x, up, "silu", gated, [(0, 300)])
        finally:
            cpu.set_threads(before)
        results.append((out, gated))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    alone = torch.empty(1, 700)
    for row in (0, 171, 299):
        rows.rms_norm(x[row : row + 1], weight, 1e-6, alone)
        assert torch.equal(alone[0], results[0][0][row])
        rows.glu(x[row : row + 1], up[row : row + 1], "silu", alone, [(0, 1)])
        assert torch.equal(alone[0], results[0][1][row])
