"""LLM.int8(): outlier columns in 16 bits keep the rest's resolution."""

import pytest
import torch
from tests.weights.formats.stored import blocks_of, dense, encoded, matrix_of, normal, squared_error

from tightfit.budget.ledger import Arena, Workspace
from tightfit.errors import UsageError
from tightfit.weights.formats import Int8, LlmInt8, Split

PLANTED = [3, 77, 200]


def with_outliers(rows=64, cols=256):
    weights = normal(rows, cols)
    weights[:, PLANTED] *= 60  # LLM.int8() reports outlier features of 60 in a range of 3.5
    return weights


def product(matrix, x):
    out = torch.empty(len(x), matrix.rows)
    matrix.matmul(x, out, Workspace(Arena(16 << 20)))
    return out


def test_the_columns_with_outliers_are_found():
    data = encoded(LlmInt8(outliers=3 / 256), with_outliers())
    assert data[:24].view(torch.int64).tolist() == PLANTED


def test_without_the_outlier_columns_all_others_lose_their_resolution():
    weights = with_outliers()
    plain = squared_error(Int8(group=0), weights)
    # A step is some 30 times smaller: that of the largest of 253 normal numbers, not of 3 that are 60 times as large.
    rest = torch.ones(256, dtype=torch.bool)
    rest[PLANTED] = False
    out = dense(matrix_of(LlmInt8(), weights))
    assert torch.equal(out[:, PLANTED], weights[:, PLANTED].bfloat16().float())
    assert (out - weights)[:, rest].square().sum() < plain / 500


def test_outlier_activations_do_not_cost_the_others_their_resolution():
    """The decomposition is of activations too: an outlier feature is not rounded together with the others."""
    weights, x = normal(64, 256).bfloat16().float(), normal(8, 256, seed=1)
    weights[:, PLANTED] *= 8
    x[:, PLANTED] *= 100
    exact = x.double() @ weights.double().T
    errors = {}
    for fmt in (LlmInt8(outliers=3 / 256), Int8(group=0)):
        out = product(matrix_of(fmt, weights, activations="int8"), x)
        errors[fmt.name] = (out - exact).square().mean().sqrt()
    assert errors["llm_int8"] < errors["int8"] / 20


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_columns_that_another_method_chose_need_no_other_format(kernels, activations):
    weights, chosen = with_outliers(), [0, 5, 6, 30, 255]
    fmt = LlmInt8(outliers=5 / 256)
    data = encoded(fmt, weights)
    data[: 8 * 5].view(torch.int64).copy_(torch.tensor(chosen))
    fmt.encode(weights, data, 0)
    matrix = fmt.matrix(data, 64, 256, activations=activations)
    assert torch.equal(dense(matrix)[:, chosen], weights[:, chosen].bfloat16().float())
    x = torch.zeros(1, 256)
    x[0, chosen] = torch.randn(5)
    assert torch.allclose(product(matrix, x), x @ dense(matrix).T, rtol=1e-5, atol=1e-5)


def test_outlier_columns_of_tall_matrices_are_found_in_any_block():
    weights = normal(100, 64)
    weights[90, 17] = 50
    data = torch.empty(LlmInt8().nbytes(100, 64), dtype=torch.uint8)
    LlmInt8().begin(data, (100, 64), blocks_of(weights, rows=16))
    assert data[:8].view(torch.int64).tolist() == [17]


def test_rows_of_zeros_have_no_outliers():
    weights = torch.zeros(32, 64)
    weights[3, 5] = 1
    assert torch.equal(dense(matrix_of(LlmInt8(), weights)), weights)


def test_both_parts_go_through_gemm_and_the_vector_kernel(kernels):
    matrix, x = matrix_of(LlmInt8(), with_outliers()), normal(20, 256, seed=1)
    out = torch.full((20, 64), float("nan"))
    matrix.matmul(x, out, Workspace(Arena(16 << 20)), Split(3, ((5, 20),)))
    exact = x.double() @ dense(matrix).double().T
    rows = [0, 1, 2, *range(5, 20)]
    assert torch.allclose(out[rows].double(), exact[rows], rtol=1e-5, atol=1e-3)
    assert out[3:5].isnan().all()


@pytest.mark.parametrize("outliers", [0.0, 1.0, -0.1, 2.0])
def test_shares_that_are_none_are_refused(outliers):
    with pytest.raises(UsageError, match="share"):
        LlmInt8(outliers=outliers)
