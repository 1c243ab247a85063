"""Products with stored matrices: right, reproducible, and inside the scratch that a dry run predicts."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.weights.formats import stored

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import cpu
from tightfit.kernels.matmul import bucket
from tightfit.kernels.ops import dry
from tightfit.weights.formats import (
    BF16,
    F16,
    F32,
    FP4,
    FP8,
    NF4,
    Int2,
    Int3,
    Int4,
    Int5,
    Int6,
    Int8,
    LlmInt8,
    Pruned,
    Split,
    Ternary,
)

FORMATS = [
    *(F32(), F16(), BF16(), Int8(), Int4(), Int8(group=16), Int4(group=0), Int6(48, symmetric=False)),
    *(Int5(), Int3(), Int2(128), NF4(), FP4(0), FP8(3), Ternary(), LlmInt8(outliers=0.1)),
    *(Pruned(), Pruned(keep=0.9)),
]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=str)
activations = pytest.mark.parametrize("activations", ["float32", "int8"])


def matrix_of(fmt, rows, cols, gemm_dtype=None, seed=0, activations="float32"):
    return stored.matrix_of(fmt, stored.normal(rows, cols, seed), gemm_dtype, activations)


def dense(matrix):
    return stored.dense(matrix).double()


def product(matrix, x, split=None):
    out = torch.full((len(x), matrix.rows), float("nan"))
    matrix.matmul(x, out, Workspace(Arena(64 << 20)), split)
    return out


def assert_close(out, x, weights, eps=2**-23):
    """Sums of n float32 products may be off by n * eps times the sum of the magnitudes; rounding errors that mostly
    cancel stay far below, so a tenth of it is asked for, but no less than the few roundings of a single product."""
    exact = x.double() @ weights.T
    bound = max(x.shape[1] / 10, 3) * eps * (x.double().abs() @ weights.abs().T) + 1e-37
    assert ((out.double() - exact).abs() <= bound).all()


@formats
def test_the_vector_kernel_multiplies_any_shape(kernels, fmt):
    @settings(max_examples=15)
    @given(st.integers(1, 70), st.integers(1, 150), st.integers(0, 9), st.integers(0, 99))
    def check(rows, cols, tokens, seed):
        matrix = matrix_of(fmt, rows, cols, seed=seed)
        x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed))
        assert_close(product(matrix, x), x, dense(matrix))

    check()


@formats
def test_slices_at_odd_rows_multiply_like_the_whole(kernels, fmt):
    matrix, x = matrix_of(fmt, 75, 90), torch.randn(5, 90)
    whole = product(matrix, x)
    for start, stop in ((0, 75), (3, 75), (17, 18), (15, 33), (16, 32), (40, 40), (31, 74)):
        assert torch.equal(product(matrix.slice(start, stop), x), whole[:, start:stop])


@formats
def test_activations_in_int8_lose_what_their_rounding_does(kernels, fmt):
    matrix, x = matrix_of(fmt, 75, 203, activations="int8"), torch.randn(6, 203)
    exact = x.double() @ dense(matrix).T
    error = (product(matrix, x) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    # A step is the largest magnitude of 16 to 48 normal numbers, 2 to 2.5, over 127: off by a root of 12th of it.
    assert error < 1.5 * 2.5 / 127 / 12**0.5
    if fmt.name in ("f32", "f16", "bf16", "fp8", "pruned"):  # have no product of integers
        assert torch.equal(product(matrix, x), product(matrix_of(fmt, 75, 203), x))
    else:
        assert error > 1e-4


@formats
@activations
def test_a_row_has_the_same_bits_at_any_number_of_tokens(kernels, fmt, activations):
    matrix, x = matrix_of(fmt, 75, 203, activations=activations), torch.randn(13, 203)
    alone = torch.cat([product(matrix, row[None]) for row in x])
    for tokens in range(1, 14):
        assert torch.equal(product(matrix, x[:tokens]), alone[:tokens])
    assert torch.equal(product(matrix, x, Split(4, ((4, 13),)))[:4], alone[:4])


@formats
@activations
def test_a_row_has_the_same_bits_on_any_number_of_threads(kernels, fmt, activations):
    # Large enough for several tasks of 64 KiB of weights, and odd.
    matrix, x = matrix_of(fmt, 501, 777, activations=activations), torch.randn(2, 777)
    before, torch_before = cpu.threads(), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            cpu.set_threads(threads)
            torch.set_num_threads(min(threads, 2))
            results += [product(matrix, x) for _ in range(2)]
    finally:
        cpu.set_threads(before)
        torch.set_num_threads(torch_before)
    assert all(torch.equal(result, results[0]) for result in results)


@formats
@pytest.mark.parametrize("gemm_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gemm_multiplies_each_range(kernels, fmt, gemm_dtype):
    matrix, x = matrix_of(fmt, 75, 130, gemm_dtype), torch.randn(60, 130)
    weights = dense(matrix)
    out = product(matrix, x, Split(3, ((3, 5), (7, 37), (37, 60))))
    assert_close(out[:3], x[:3], weights)
    assert out[5:7].isnan().all()  # belongs to no range: not touched
    rows = [*range(3, 5), *range(7, 60)]
    if gemm_dtype == torch.float32:
        assert_close(out[rows], x[rows], weights)
    else:  # inputs, weights and results are rounded to 8 bits: 2^-9 each
        exact, size = x[rows].double() @ weights.T, x[rows].double().abs() @ weights.abs().T
        assert ((out[rows] - exact).abs() <= 3 * 2**-9 * size).all()
        assert not torch.equal(out[rows], product(matrix_of(fmt, 75, 130), x)[rows])


@pytest.mark.parametrize("fmt", [BF16(), Int4()], ids=str)
@pytest.mark.parametrize("gemm_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_gemm_range_has_the_same_bits_whatever_is_beside_it(kernels, fmt, gemm_dtype):
    matrix, x = matrix_of(fmt, 100, 130, gemm_dtype), torch.randn(90, 130)
    alone = product(matrix, x[40:70], Split(0, ((0, 30),)))
    beside = product(matrix, x, Split(5, ((5, 40), (40, 70), (70, 90))))
    assert torch.equal(beside[40:70], alone)
    # Garbage in the padding of an earlier, longer range must not leak into it either.
    ws, out = Workspace(Arena(64 << 20)), torch.empty(30, 100)
    ws.arena.view(0, (64 << 18,), torch.float32).fill_(float("nan"))
    matrix.matmul(x[40:70], out, ws, Split(0, ((0, 30),)))
    assert torch.equal(out, alone)


@formats
def test_gemm_in_int8_has_the_bits_of_decoding_and_is_float32_where_that_rounds_nothing(kernels, fmt):
    x, split = torch.randn(60, 130), Split(3, ((3, 37), (37, 60)))
    found = product(matrix_of(fmt, 75, 130, torch.int8, activations="int8"), x, split)
    if isinstance(fmt, (F32, F16, BF16, FP8, Pruned)):
        assert torch.equal(found, product(matrix_of(fmt, 75, 130), x, split))
    elif isinstance(fmt, LlmInt8):  # its columns in bfloat16 are a gemm in float32
        assert torch.allclose(found, product(matrix_of(fmt, 75, 130, activations="int8"), x), rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(found, product(matrix_of(fmt, 75, 130, activations="int8"), x))


def test_buckets_are_powers_of_two_from_sixteen():
    assert [bucket(n) for n in (1, 15, 16, 17, 32, 33, 512, 513)] == [16, 16, 16, 32, 32, 64, 512, 1024]


@formats
def test_the_transposed_product_is_that_of_the_decoded_matrix(kernels, fmt):
    matrix, g = matrix_of(fmt, 75, 130), torch.randn(7, 75)
    out = torch.full((7, 130), float("nan"))
    matrix.matmul_t(g, out, Workspace(Arena(64 << 20)))
    assert_close(out, g, dense(matrix).T)


def test_blocks_of_a_large_matrix_add_up(kernels):
    # 4 MiB of float32 are 1024 rows of 1024: three blocks, the last one short.
    matrix, x, g = matrix_of(Int4(), 2100, 1024), torch.randn(20, 1024), torch.randn(4, 2100)
    weights = dense(matrix)
    assert_close(product(matrix, x, Split(0, ((0, 20),))), x, weights)
    assert_close(product(matrix, x[:1]), x[:1], weights)
    back = torch.empty(4, 1024)
    matrix.matmul_t(g, back, Workspace(Arena(64 << 20)))
    assert_close(back, g, weights.T)


@formats
def test_rows_may_lie_apart(kernels, fmt):
    matrix = matrix_of(fmt, 33, 70)
    wide_x, wide_out, wide_rows = torch.randn(6, 100), torch.full((6, 50), 7.0), torch.full((3, 90), 7.0)
    x, out, rows = wide_x[:, 5:75], wide_out[:, 11:44], wide_rows[:, 9:79]
    ws = Workspace(Arena(64 << 20))
    for split in (None, Split(2, ((2, 6),))):
        matrix.matmul(x, out, ws, split)
        assert_close(out, x, dense(matrix))
    matrix.decode(torch.tensor([32, 0, 17]), rows, ws)
    assert torch.equal(rows.double(), dense(matrix)[[32, 0, 17]])
    assert (wide_out[:, :11] == 7).all()
    assert (wide_out[:, 44:] == 7).all()
    assert (wide_rows[:, :9] == 7).all()
    assert (wide_rows[:, 79:] == 7).all()


@formats
@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 1e30])
def test_extreme_inputs_give_what_float32_can_hold(kernels, fmt, magnitude):
    matrix, x = matrix_of(fmt, 40, 90), torch.randn(4, 90) * magnitude
    assert_close(product(matrix, x), x, dense(matrix))


@pytest.mark.parametrize("fmt", [F32(), BF16(), Int8(), Int4()], ids=str)
def test_extreme_weights_give_what_float32_can_hold(kernels, fmt):
    # In groups of their own, because a group has one scale; 1e-40 is subnormal, and the tiles store it as zero.
    weights = torch.randn(40, 128) * torch.tensor([1e-40, 1e-30, 1.0, 1e30]).repeat_interleave(32)
    data = torch.empty(fmt.nbytes(40, 128), dtype=torch.uint8)
    fmt.encode(weights, data, 0)
    matrix, x = fmt.matrix(data, 40, 128), torch.randn(3, 128)
    for column in range(0, 128, 32):  # one group at a time, or 1e30 would hide the others
        alone = torch.zeros(3, 128)
        alone[:, column : column + 32] = x[:, column : column + 32]
        out = product(matrix, alone)
        assert out.isfinite().all()
        assert_close(out, alone, dense(matrix))


@formats
def test_rows_are_decoded_in_the_order_asked_for(kernels, fmt):
    matrix = matrix_of(fmt, 75, 90)
    indices = torch.tensor([74, 0, 16, 16, 15, 31])
    out = torch.empty(6, 90)
    matrix.decode(indices, out, Workspace(Arena(64 << 20)))
    assert torch.equal(out.double(), dense(matrix)[indices])
    matrix.slice(5, 75).decode(indices[1:], out[1:], Workspace(Arena(64 << 20)))
    assert torch.equal(out[1:].double(), dense(matrix)[indices[1:] + 5])


@formats
@pytest.mark.parametrize("index", [75, -1, 2**40])
def test_a_row_that_does_not_exist_is_an_error(kernels, fmt, index):
    with pytest.raises(IndexError):
        matrix_of(fmt, 75, 90).decode(torch.tensor([0, index]), torch.empty(2, 90), Workspace(Arena(64 << 20)))


def test_tensors_that_a_kernel_cannot_read_are_refused(kernels):
    matrix, ws = matrix_of(Int8(), 20, 40), Workspace(Arena(64 << 20))
    good_x, good_out = torch.zeros(2, 40), torch.zeros(2, 20)
    for x, out in (
        (torch.zeros(2, 41), good_out),
        (good_x, torch.zeros(2, 19)),
        (good_x.double(), good_out),
        (good_x, good_out.bfloat16()),
        (torch.zeros(40, 2).T, good_out),
        (good_x, torch.zeros(20, 2).T),
        (torch.zeros(40), good_out),
        (torch.zeros(3, 40), good_out),
    ):
        with pytest.raises(ValueError, match="expected"):
            matrix.matmul(x, out, ws)


SPLITS = [None, Split(0, ((0, 20),)), Split(3, ((3, 9), (9, 20)))]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 1500),
    st.integers(1, 900),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    st.integers(0, 20),
)
def test_a_dry_run_takes_the_scratch_of_the_real_one(kernels, fmt, rows, cols, gemm_dtype, start):
    data = torch.zeros(fmt.nbytes(rows, cols), dtype=torch.uint8)
    matrix = fmt.matrix(data, rows, cols, gemm_dtype).slice(min(start, rows - 1), rows)
    x, out, g = torch.zeros(20, cols), torch.zeros(20, matrix.rows), torch.zeros(20, matrix.rows)
    back, indices = torch.zeros(20, cols), torch.zeros(20, dtype=torch.int64)
    for call in (
        *(lambda ws, split=split: matrix.matmul(x, out, ws, split) for split in SPLITS),
        lambda ws: matrix.matmul_t(g, back, ws),
        lambda ws: matrix.decode(indices, back, ws),
    ):
        predicted, real = Workspace(Arena(64 << 20)), Workspace(Arena(64 << 20))
        out.fill_(7)
        back.fill_(7)
        with dry():
            call(predicted)
        assert (out == 7).all()
        assert (back == 7).all()
        call(real)
        assert predicted.high_water == real.high_water
        assert predicted.top == real.top == 0


def test_scratch_does_not_grow_with_the_rows(kernels):
    # A vocabulary must not be decoded whole. 4096 rows of 512 are two blocks of 4 MiB in float32, 32768 are sixteen.
    def high_water(rows):
        ws, x, out = Workspace(Arena(64 << 20)), torch.zeros(16, 512), torch.zeros(16, rows)
        matrix = Int4().matrix(torch.zeros(Int4().nbytes(rows, 512), dtype=torch.uint8), rows, 512)
        with dry():
            for split in (None, Split(0, ((0, 16),))):
                matrix.matmul(x, out, ws, split)
            matrix.matmul_t(out, x, ws)
        return ws.high_water

    assert high_water(32768) == high_water(4096)
