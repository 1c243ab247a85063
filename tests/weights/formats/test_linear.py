"""Tuning on a stored base: the gradient of LoRA through a quantised layer is that of the decoded matrix."""

import pytest
import torch
from tests.weights.formats import stored

from tightfit.weights.formats import BF16, F32, FP8, NF4, Int3, Int4, Int8, LlmInt8, Pruned, Ternary
from tightfit.weights.formats.linear import linear

ROWS, COLS, RANK = 75, 90, 4


def matrix_and_dense(fmt, gemm_dtype=None):
    matrix = stored.matrix_of(fmt, torch.randn(ROWS, COLS) / COLS**0.5, gemm_dtype)
    return matrix, stored.dense(matrix)


def lora_gradients(base, x, a, b):
    """Result, loss and gradients of a layer with trainable A (rank, cols) and B (rows, rank) beside a frozen base."""
    x, a, b = (tensor.clone().requires_grad_() for tensor in (x, a, b))
    y = base(x) + x @ a.T @ b.T
    loss = y.sigmoid().square().mean()
    loss.backward()
    return y, loss, x.grad, a.grad, b.grad


@pytest.mark.parametrize(
    "fmt",
    [F32(), BF16(), Int8(), Int4(0), Int3(48, symmetric=False), NF4(), FP8(), Ternary(), LlmInt8(), Pruned()],
    ids=str,
)
@pytest.mark.parametrize("shape", [(COLS,), (5, COLS), (2, 3, COLS)], ids=str)
def test_lora_on_a_stored_matrix_learns_as_on_the_decoded_one(kernels, fmt, shape):
    matrix, dense = matrix_and_dense(fmt)
    x, a, b = torch.randn(shape), torch.randn(RANK, COLS), torch.randn(ROWS, RANK)
    stored = lora_gradients(lambda x: linear(x, matrix), x, a, b)
    decoded = lora_gradients(lambda x: x @ dense.T, x, a, b)
    for ours, theirs in zip(stored, decoded, strict=True):
        # Both are float32 sums of at most 90 terms in different orders.
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_the_gradient_is_that_of_finite_differences():
    matrix, _ = matrix_and_dense(Int4())
    x, direction, g = torch.randn(3, COLS), torch.randn(3, COLS), torch.randn(3, ROWS)
    x.requires_grad_()
    linear(x, matrix).backward(g)
    # The layer is linear, so the difference is exact but for float32 rounding.
    difference = ((linear(x + direction, matrix) - linear(x - direction, matrix)) / 2 * g).sum()
    assert torch.allclose((x.grad * direction).sum(), difference, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_other_types_come_back_in_their_type(dtype):
    matrix, dense = matrix_and_dense(Int8())
    x = torch.randn(4, COLS).to(dtype).requires_grad_()
    y = linear(x, matrix)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert torch.allclose(y.float(), x.float() @ dense.T, rtol=2**-7, atol=2**-6)
    assert torch.allclose(x.grad.float(), dense.sum(0).expand(4, -1), rtol=2**-7, atol=2**-6)


def test_no_decoded_matrix_is_kept_for_the_backward_pass():
    matrix, _ = matrix_and_dense(Int4())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        linear(torch.randn(4, COLS, requires_grad=True), matrix)
    assert not kept


def test_no_gradient_is_computed_where_none_is_asked_for():
    matrix, _ = matrix_and_dense(Int8())
    assert not linear(torch.randn(4, COLS), matrix).requires_grad
