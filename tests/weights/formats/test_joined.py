"""Matrices that are multiplied together, and products that are added to what is there."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.weights.formats.stored import matrix_of, normal

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels.ops import dry
from tightfit.weights.formats import BF16, FP8, Int4, Int8, Joined, LlmInt8, Pruned, Split, Ternary

SPLITS = [None, Split(20), Split(0, ((0, 20),)), Split(3, ((3, 9), (9, 20)))]
COLS = 90


def product(matrix, x, split=None, accumulate=0.0, start=float("nan")):
    out, ws = torch.full((len(x), matrix.rows), start), Workspace(Arena(16 << 20))
    matrix.matmul(x, out, ws, split, accumulate)
    return out


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from([BF16(), Int8(), Int4(16), FP8(3), Ternary(), Pruned(), LlmInt8()]), st.integers(1, 40)
        )
    ),
    st.sampled_from(SPLITS),
    st.sampled_from(["float32", "int8"]),
    st.sampled_from([0.0, 0.5]),
)
def test_a_joined_product_is_that_of_each_matrix(kernels, kinds, split, activations, accumulate):
    kinds = kinds or [(Int4(), 7)]
    matrices = [matrix_of(fmt, normal(rows, COLS, rows), activations=activations) for fmt, rows in kinds]
    x = normal(20, COLS)
    joined = Joined(matrices)
    assert joined.rows == sum(rows for _, rows in kinds)
    each = torch.cat([product(matrix, x, split, accumulate, 3.0) for matrix in matrices], dim=1)
    assert torch.equal(product(joined, x, split, accumulate, 3.0), each)


@pytest.mark.parametrize("fmt", [BF16(), Int8(), Int4(0), FP8(), Pruned(), LlmInt8()], ids=str)
@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("gemm_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_can_be_added(kernels, fmt, split, gemm_dtype):
    matrix, x, before = matrix_of(fmt, normal(37, COLS), gemm_dtype), normal(20, COLS), normal(20, 37, 1)
    out = before.clone()
    matrix.matmul(x, out, Workspace(Arena(16 << 20)), split, accumulate=-0.5)
    assert torch.allclose(out, before - 0.5 * product(matrix, x, split), rtol=1e-5, atol=1e-5)


def test_rows_outside_of_all_ranges_are_left_alone(kernels):
    for fmt in (Int4(), LlmInt8()):
        matrix, x = matrix_of(fmt, normal(37, COLS)), normal(20, COLS)
        for accumulate in (0.0, 1.0):
            out = product(matrix, x, Split(2, ((5, 9),)), accumulate, start=7.0)
            assert (out[[2, 3, 4, *range(9, 20)]] == 7).all()


def test_joined_matrices_take_in_a_dry_run_what_they_take(kernels):
    for split in SPLITS:
        matrices = [matrix_of(Int4(), normal(rows, COLS), activations="int8") for rows in (20, 33)]
        joined, x, out = Joined(matrices), normal(20, COLS), torch.zeros(20, 53)
        predicted, real = Workspace(Arena(16 << 20)), Workspace(Arena(16 << 20))
        with dry():
            joined.matmul(x, out, predicted, split)
        assert not out.any()
        joined.matmul(x, out, real, split)
        assert predicted.high_water == real.high_water
