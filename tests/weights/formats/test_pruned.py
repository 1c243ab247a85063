"""Endor's format: a bitmap and packed values hold pruned matrices exactly, in the bytes that its paper states."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.weights.formats.stored import decoded, dense, encoded, matrix_of, normal

from tightfit.budget.ledger import Arena, Workspace
from tightfit.errors import UsageError
from tightfit.kernels import cpu
from tightfit.weights.formats import BF16, Pruned, Split

shares = st.integers(1, 99).map(lambda percent: percent / 100)


def pruned(rows, cols, kept, seed=0):
    """Rows of which each has ``kept`` numbers in random places, in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(rows, cols, generator=generator).argsort(dim=1)
    weights = normal(rows, cols, seed).bfloat16()
    weights[weights == 0] = 1
    return weights.masked_fill_(places >= kept, 0)


def by_the_book(data, rows, cols, kept):
    """The documented layout, read one weight at a time."""
    words, out = -(-cols // 64), torch.zeros(rows, cols)
    for row, stored in enumerate(data.view(rows, -1)):
        bitmap = int.from_bytes(bytes(stored[: 8 * words].numpy()), "little")
        values = iter(stored[8 * words :][: 2 * kept].view(torch.bfloat16).tolist())
        for place in range(64 * words):
            if bitmap >> place & 1:
                run, i, half = place // 32, place % 32 // 2, place % 2
                out[row, 32 * run + 16 * half + i] = next(values)
    return out


@pytest.mark.parametrize("cols", [2048, 4096, 5632, 11008])
def test_half_of_the_weights_take_nine_sixteenths_of_dense_bytes(cols):
    assert Pruned().nbytes(100, cols) == BF16().nbytes(100, cols) * (0.5 * 16 + 1) / 16


@given(shares, st.integers(1, 20), st.integers(1, 3000))
def test_bytes_are_values_and_a_bit_for_each_weight_filled_up_to_eight(keep, rows, cols):
    bits = (16 * math.ceil(round(keep * cols, 6)) + cols) * rows
    assert bits <= 8 * Pruned(keep).nbytes(rows, cols) <= bits + rows * (64 + 64)


@settings(max_examples=40)
@given(shares, st.integers(1, 20), st.integers(1, 300), st.integers(0, 2**32), st.data())
def test_matrices_that_are_pruned_already_are_held_bit_by_bit(keep, rows, cols, seed, data):
    kept = data.draw(st.integers(0, Pruned(keep).kept(cols)))
    weights = pruned(rows, cols, kept, seed)
    assert torch.equal(decoded(Pruned(keep), weights), weights.float())


@settings(max_examples=40)
@example(0.5, 3, 64, 0, True)
@given(shares, st.integers(1, 20), st.integers(1, 300), st.integers(0, 2**32), st.booleans())
def test_the_largest_of_each_row_stay_and_of_equal_ones_the_first(keep, rows, cols, seed, ties):
    weights = normal(rows, cols, seed).bfloat16().float()
    if ties:
        weights = weights.clamp_(-1, 1).mul_(2).round_()  # -2 to 2, and zeros of both signs
    kept = Pruned(keep).kept(cols)
    out = decoded(Pruned(keep), weights)
    for row, found in zip(weights.tolist(), out.tolist(), strict=True):
        order = sorted(range(cols), key=lambda i: (-abs(row[i]), i))
        stay = set(order[:kept])
        assert found == [row[i] if i in stay else 0 for i in range(cols)]


@settings(max_examples=40)
@given(shares, st.integers(1, 20), st.integers(1, 300), st.integers(0, 2**32))
def test_rows_have_the_documented_layout(keep, rows, cols, seed):
    weights = normal(rows, cols, seed)
    data, kept = encoded(Pruned(keep), weights), Pruned(keep).kept(cols)
    out = by_the_book(data, rows, cols, kept)
    assert torch.equal(dense(Pruned(keep).matrix(data, rows, cols)), out)
    assert ((out != 0).sum(1) == kept).all()


@pytest.mark.skipif(not cpu.available(), reason="installed without the compiled kernels")
@settings(max_examples=40)
@given(
    shares,
    st.integers(1, 20),
    st.integers(1, 300),
    st.integers(0, 2**32),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.booleans(),
)
def test_the_compiled_encoder_writes_the_bytes_of_the_reference(keep, rows, cols, seed, dtype, ties):
    weights = normal(rows, cols, seed).to(dtype)
    if ties:
        weights = weights.clamp_(-1, 1).mul_(2).round_()
    ours, chosen = encoded(Pruned(keep), weights), cpu.features()["chosen"]
    try:
        cpu.use(cpu.REFERENCE)
        assert torch.equal(ours, encoded(Pruned(keep), weights))
    finally:
        cpu.use(chosen)


def test_rows_keep_as_many_as_wanda_leaves():
    # It zeroes int(cols * sparsity) of each row.
    for cols in (1, 63, 100, 2048, 2050):
        for keep, sparsity in ((0.5, 0.5), (0.25, 0.75), (0.75, 0.25)):
            assert Pruned(keep).kept(cols) == cols - int(cols * sparsity)
    assert Pruned(0.07).kept(100) == 7  # in binary 0.07 * 100 is a little more than 7


def test_a_pruned_product_is_that_of_the_dense_matrix(kernels):
    weights, x = pruned(75, 203, 100), normal(20, 203, 1)
    for split in (None, Split(3, ((3, 20),))):
        out, expected, ws = torch.empty(20, 75), torch.empty(20, 75), Workspace(Arena(64 << 20))
        matrix_of(Pruned(), weights).matmul(x, out, ws, split)
        matrix_of(BF16(), weights).matmul(x, expected, ws, split)
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_a_damaged_bitmap_reads_nothing_outside_of_the_matrix(kernels):
    # Every input has a bit: the rows ask for twice as many values as there are. Behind the matrix there are no numbers.
    fmt, cols = Pruned(), 1000
    stored = torch.full((2 * fmt.nbytes(20, cols),), 0xFF, dtype=torch.uint8)
    data = stored[: fmt.nbytes(20, cols)]
    fmt.encode(torch.ones(20, cols), data, 0)
    data.view(20, -1)[:, :125] = 0xFF
    for gemm_dtype in (torch.float32, torch.bfloat16):
        matrix, x = fmt.matrix(data, 20, cols, gemm_dtype), torch.ones(20, cols)
        out, ws = torch.empty(20, 20), Workspace(Arena(64 << 20))
        matrix.matmul(x, out, ws, Split(4, ((4, 20),)))
        assert out[:, -1].isfinite().all()
        assert dense(matrix)[-1].isfinite().all()


@pytest.mark.parametrize("keep", [0.0, 1.0, -0.5, 50.0, float("nan")])
def test_shares_that_are_none_are_refused(keep):
    with pytest.raises(UsageError, match="share"):
        Pruned(keep)
