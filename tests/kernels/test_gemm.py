"""Matrices times many vectors in bfloat16 through AMX: right, reproducible, inside the scratch that was promised."""

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.weights.formats.stored import HALVES, TILED, matrix_of, normal

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import cpu, matmul
from tightfit.kernels.ops import dry
from tightfit.kernels.weight import Joined, Weight
from tightfit.weights.formats import BF16, F16, F32, Int4, Int8, Pruned, Ternary

FORMATS = [F32(), F16(), BF16(), Pruned(), Pruned(keep=0.9), *TILED]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=str)

pytestmark = pytest.mark.skipif("amx" not in cpu.supported(), reason="this processor has no AMX")


@pytest.fixture(autouse=True)
def amx():
    chosen, threads = cpu.features()["chosen"], cpu.threads()
    cpu.use("amx")
    cpu.set_threads(2)
    yield
    cpu.use(chosen)
    cpu.set_threads(threads)


def weight_of(fmt, rows, cols, seed=0):
    return matrix_of(fmt, normal(rows, cols, seed)).weight


def rounded(weight):
    """The matrix as decoding to bfloat16 has it."""
    out = torch.empty(weight.rows, weight.cols, dtype=torch.bfloat16)
    matmul.decode_block(weight, 0, weight.rows, out, Workspace(Arena(64 << 20)))
    return out


def product(weights, x, ranges=None, accumulate=0.0, out=None):
    out = torch.full((len(x), weights.rows), float("nan")) if out is None else out
    ws = Workspace(Arena(64 << 20))
    matmul.gemm(x, weights, out, ranges or [(0, len(x))], torch.bfloat16, ws, accumulate)
    assert ws.top == 0
    return out


def assert_product(out, x, weights):
    """Products of bfloat16 are exact in float32; sums of n of them may be off by n roundings of 2^-24, which mostly
    cancel, so a fifth of that is asked for, but no less than a few. AMX reads subnormal numbers as zeros."""
    x, weights = x.bfloat16().double(), weights.double()
    bound = max(x.shape[1] / 5, 4) * 2**-24 * (x.abs() @ weights.abs().T) + 1e-30
    assert ((out.double() - x @ weights.T).abs() <= bound).all()


@formats
def test_it_multiplies_rounded_factors_of_any_shape(fmt):
    # 32 rows, tokens and inputs make a step, 288 inputs a block, 48 the coarsest unit of codes.
    @settings(max_examples=15)
    @given(st.integers(1, 100), st.integers(1, 700), st.integers(1, 70), st.integers(0, 40), st.integers(0, 99))
    def check(rows, cols, tokens, start, seed):
        whole = weight_of(fmt, start + rows, cols, seed)
        weight = whole.slice(start, start + rows)  # in the middle of a tile
        x = normal(tokens, cols, seed)
        assert_product(product(weight, x), x, rounded(whole)[start:])

    check()


@formats
@pytest.mark.parametrize("scale", [1.0, 1e-34, 1e30])
def test_weights_are_rounded_once(fmt, scale):
    # A token with a single one gives the decoded weights themselves.
    if (isinstance(fmt, F16) or fmt in HALVES) and scale != 1:
        pytest.skip("beyond float16")
    weight = matrix_of(fmt, normal(40, 150) * scale).weight
    assert torch.equal(product(weight, torch.eye(150)), rounded(weight).float().T)


@pytest.mark.parametrize(
    ("rows", "cols", "tokens"), [(600, 100, 70), (40, 2600, 300), (300, 1100, 530), (16, 16, 1100)]
)
@pytest.mark.parametrize("fmt", [BF16(), Pruned(), Int4(), Ternary(48)], ids=str)
def test_matrices_and_prompts_of_many_blocks_add_up(fmt, rows, cols, tokens):
    weight, x = weight_of(fmt, rows, cols), normal(tokens, cols)
    assert_product(product(weight, x), x, rounded(weight))


@pytest.mark.parametrize("fmt", [BF16(), Pruned(), Int4(), Ternary(48)], ids=str)
def test_a_token_has_the_same_bits_whatever_is_beside_it(fmt):
    # With 530 tokens there are two runs of them, and their tiles do not fit into the second-level cache.
    weight, x = weight_of(fmt, 100, 1100), normal(530, 1100)
    whole = product(weight, x)
    draw = random.Random(0)
    for tokens in (1, 2, 15, 16, 17, 33, 100, 529):
        some = draw.sample(range(530), tokens)
        assert torch.equal(product(weight, x[some]), whole[some])


@pytest.mark.parametrize(("rows", "tokens"), [(600, 40), (5, 300), (130, 600)])
def test_a_token_has_the_same_bits_on_any_number_of_threads(rows, tokens):
    weights = Joined([weight_of(Int4(), rows, 1000), weight_of(BF16(), 33, 1000)])
    x, results = normal(tokens, 1000), []
    for threads in (1, 2, 3, 7):
        cpu.set_threads(threads)
        results += [product(weights, x) for _ in range(2)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_joined_matrices_give_what_each_gives_alone():
    # Ternary codes want blocks of their own.
    weights = [
        weight_of(fmt, rows, 500)
        for fmt, rows in ((Int4(), 70), (Ternary(48), 33), (Pruned(), 21), (BF16(), 1), (Int8(0), 160))
    ]
    weights.append(weights[0].slice(3, 40))
    x = normal(37, 500)
    alone = torch.cat([product(weight, x) for weight in weights], dim=1)
    assert torch.equal(product(Joined(weights), x), alone)


@pytest.mark.parametrize("accumulate", [1.0, -0.3])
def test_products_are_added(accumulate):
    weight = weight_of(Int4(), 75, 600).slice(5, 75)
    x, before = normal(40, 600), normal(40, 70, 1)
    out = product(weight, x, accumulate=accumulate, out=before.clone())
    expected = before.double() + torch.tensor(accumulate).double() * product(weight, x).double()
    assert torch.equal(out, expected.float())


def test_nothing_but_the_products_is_written():
    weight = weight_of(Int4(), 75, 600).slice(5, 75)
    x, out = normal(50, 600), torch.full((50, 100), 7.0)
    matmul.gemm(x, weight, out[:, 11:81], [(3, 20), (20, 33), (40, 41)], torch.bfloat16, Workspace(Arena(64 << 20)))
    written = torch.zeros(50, 100, dtype=torch.bool)
    written[3:33, 11:81] = written[40:41, 11:81] = True
    assert ((out == 7) == ~written).all()


@formats
def test_nothing_is_read_but_the_inputs(fmt):
    # What lies beside the inputs and in the scratch is not a number, so one that were read would show. The second token
    # is not a number either: the others have nothing to do with it.
    weight, ws = weight_of(fmt, 20, 75), Workspace(Arena(64 << 20))
    ws.arena.view(0, (16 << 20,), torch.float32).fill_(float("nan"))
    wide, out = torch.full((5, 80), float("nan")), torch.empty(5, 20)
    wide[:, :75] = 1
    wide[1] = float("nan")
    matmul.gemm(wide[:, :75], weight, out, [(0, 5)], torch.bfloat16, ws)
    assert out[[0, 2, 3, 4]].isfinite().all()
    assert out[1].isnan().all()


@settings(max_examples=30)
@given(st.integers(1, 700), st.integers(1, 6000), st.integers(1, 1200), st.integers(1, 3))
def test_a_dry_run_takes_the_scratch_of_the_real_one(rows, cols, tokens, threads):
    cpu.set_threads(threads)
    weight = Weight(torch.zeros(rows * cols * 2, dtype=torch.uint8), "bf16", 0, rows, cols)
    x, out = torch.zeros(tokens, cols), torch.full((tokens, rows), 7.0)
    predicted, real = Workspace(Arena(1 << 30)), Workspace(Arena(1 << 30))
    with dry():
        matmul.gemm(x, weight, out, [(0, tokens)], torch.bfloat16, predicted)
    assert (out == 7).all()
    matmul.gemm(x, weight, out, [(0, tokens)], torch.bfloat16, real)
    assert predicted.high_water == real.high_water


@given(st.integers(1, 20000), st.integers(1, 2000), st.integers(0, 700), st.integers(1, 64))
def test_scratch_never_shrinks_with_more_tokens(cols, tokens, more, threads):
    # The plan reserves that of the largest step.
    nbytes = cpu.module.gemm_scratch_nbytes
    assert nbytes(cols, tokens, threads) <= nbytes(cols, tokens + more, threads)


def test_scratch_does_not_grow_with_the_rows():
    def high_water(rows):
        ws, weight = Workspace(Arena(64 << 20)), Weight(torch.zeros(rows * 64, dtype=torch.uint8), "bf16", 0, rows, 32)
        with dry():
            matmul.gemm(torch.zeros(16, 32), weight, torch.zeros(16, rows), [(0, 16)], torch.bfloat16, ws)
        return ws.high_water

    assert high_water(20000) == high_water(20)


def test_tensors_that_do_not_fit_are_refused():
    weight, ws = weight_of(Int4(), 20, 40), Workspace(Arena(1 << 20))
    good_x, good_out = torch.zeros(3, 40), torch.zeros(3, 20)
    for x, out in ((good_x[:, :39], good_out), (good_x, good_out[:, :19]), (good_x.double(), good_out)):
        with pytest.raises(ValueError, match="expected"):
            matmul.gemm(x, weight, out, [(0, 3)], torch.bfloat16, ws)


def test_kernels_without_amx_leave_it_to_torch():
    weight, x = weight_of(Int4(), 75, 600), normal(40, 600)
    compiled = product(weight, x)
    for kernels in cpu.supported()[1:]:
        cpu.use(kernels)
        assert not cpu.has_gemm()
        with pytest.raises(ValueError, match="no gemm"):
            cpu.module.gemm(weight.product, x.data_ptr(), 40, 600, 0, 75, 0.0, 0, 1)
        # torch rounds results to bfloat16, too
        assert torch.allclose(product(weight, x), compiled, rtol=2**-8, atol=1e-3)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read on Linux only")
def test_no_memory_is_taken():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    weight, x, out = weight_of(Int4(), 512, 512), normal(600, 512), torch.zeros(600, 512)
    ws = Workspace(Arena(64 << 20))
    ws.arena.view(0, (64 << 20,)).zero_()
    matmul.gemm(x[:16], weight, out[:16], [(0, 16)], torch.bfloat16, ws)
    before = resident()
    for tokens in range(20, 600, 20):
        matmul.gemm(x[:tokens], weight, out[:tokens], [(0, tokens)], torch.bfloat16, ws)
    # The measure counts per thread and may be off by 64 pages each.
    assert resident() - before < 1 << 20
