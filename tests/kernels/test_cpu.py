"""The compiled kernels agree with the torch references, and their threads behave."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from tests.weights.formats.stored import matrix_of

from tightfit.budget.ledger import Arena, Workspace
from tightfit.errors import UsageError
from tightfit.kernels import cpu, matmul, matmul_reference
from tightfit.kernels.weight import Weight
from tightfit.weights.formats import BF16, F16, F32, Int4, Int8, Pruned

COMPILED = cpu.supported()[:-1]
FORMATS = [F32(), F16(), BF16(), Int8(), Int4(), Int8(group=16), Int4(group=128), Int8(group=96), Int4(group=48)]
FORMATS += [Pruned(), Pruned(keep=0.9)]
formats = pytest.mark.parametrize("fmt", FORMATS, ids=str)

pytestmark = pytest.mark.skipif(not COMPILED, reason="installed without the compiled kernels")


@pytest.fixture(autouse=True)
def restore():
    torch.manual_seed(0)
    chosen, threads = cpu.features()["chosen"], cpu.threads()
    yield
    cpu.use(chosen)
    cpu.set_threads(threads)


@pytest.fixture
def ws():
    return Workspace(Arena(64 << 20))


def weight_of(fmt, rows, cols):
    return matrix_of(fmt, torch.randn(rows, cols)).weight


@pytest.mark.parametrize("isa", COMPILED)
@formats
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (16, 16), (75, 203), (33, 1024), (130, 777)])
def test_products_agree_with_the_reference(ws, isa, fmt, rows, cols):
    cpu.use(isa)
    weight, x = weight_of(fmt, rows, cols), torch.randn(7, cols)
    ours, reference = torch.empty(7, rows), torch.empty(7, rows)
    matmul.vector_matmul(x, weight, ours, ws)
    matmul_reference.vector_matmul(x, [weight], reference, ws)
    # Sums of n products of magnitude 1 in two orders: rounding errors of 2^-24 that add up like a random walk, where
    # partial sums are of size sqrt(n).
    assert torch.allclose(ours, reference, rtol=1e-5, atol=4 * 2**-24 * cols)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("fmt", FORMATS[3:], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_has_the_bits_of_the_reference(ws, isa, fmt, dtype):
    cpu.use(isa)
    weight = weight_of(fmt, 75, 203)
    weight.data.view(-1)[-32:].view(torch.bfloat16).fill_(-1.5e-38)  # products that are subnormal numbers
    for start, stop in ((0, 75), (5, 33), (16, 17), (64, 75), (7, 7)):
        ours = torch.full((stop - start, 210), 7.0, dtype=dtype)
        reference = ours.clone()
        matmul.decode_block(weight, start, stop, ours[:, :203], ws)
        matmul_reference.decode_block(weight, start, stop, reference[:, :203], ws)
        assert torch.equal(ours, reference)
    indices = torch.tensor([74, 0, 3, 3, 16, 31])
    ours, reference = torch.empty(6, 203), torch.empty(6, 203)
    matmul.decode_rows(weight, indices, ours, ws)
    matmul_reference.decode_rows(weight, indices, reference, ws)
    assert torch.equal(ours, reference)


@pytest.mark.parametrize("isa", COMPILED)
def test_every_float16_is_read_exactly(ws, isa):
    cpu.use(isa)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    weight = Weight(every.view(torch.uint8), "f16", 0, 2**16, 1)
    out = torch.empty(1, 2**16)
    matmul.vector_matmul(torch.ones(1, 1), weight, out, ws)
    expected = every.view(torch.float16).float()[None]
    assert torch.equal(out.nan_to_num(nan=12345.0), expected.nan_to_num(nan=12345.0))


@pytest.mark.parametrize("isa", COMPILED)
@formats
def test_nothing_is_read_beyond_the_inputs(ws, isa, fmt):
    # What lies beside the inputs is not a number, so one that were read would show, padding of tiles included.
    cpu.use(isa)
    weight = weight_of(fmt, 20, 75)
    wide, out = torch.full((5, 80), float("nan")), torch.empty(5, 20)
    wide[:, :75] = 1
    matmul.vector_matmul(wide[:, :75], weight, out, ws)
    assert out.isfinite().all()


def test_the_fastest_kernels_of_the_processor_are_chosen():
    flags = subprocess.run(["cat", "/proc/cpuinfo"], capture_output=True, text=True).stdout.split()
    levels = (
        ("amx", "amx_bf16"),
        ("avx512vnni", "avx512_vnni"),
        ("avx512", "avx512bw"),
        ("avxvnni", "avx_vnni"),
        ("avx2", "avx2"),
    )
    has = [isa for isa, flag in levels if flag in flags]
    assert cpu.supported() == [*has, "portable", "reference"]
    assert fresh("print(cpu.features()['chosen'])", without="TIGHTFIT_CPU") == cpu.supported()[0]


@pytest.mark.parametrize("name", cpu.supported())
def test_the_environment_can_force_the_kernels(name):
    assert fresh("print(cpu.features()['chosen'], cpu.available())", TIGHTFIT_CPU=name) == (
        f"{name} {name != 'reference'}"
    )


def test_kernels_that_cannot_run_are_refused():
    with pytest.raises(UsageError, match="cannot run the kernels 'sse9'") as error:
        cpu.use("sse9")
    assert "portable" in error.value.hint
    with pytest.raises(UsageError, match="0 threads"):
        cpu.set_threads(0)


def fresh(code, without=None, **environment):
    """What a new interpreter prints."""
    environment = {**os.environ, **environment}
    environment.pop(without, None)
    command = [sys.executable, "-c", f"from tightfit.kernels import cpu\n{code}"]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def test_a_call_from_many_threads_at_once_is_right(ws):
    # The pool serves one call at a time; the others do their work alone.
    weight, x = weight_of(Int8(), 1003, 300), torch.randn(4, 300)
    expected = torch.empty(4, 1003)
    matmul.vector_matmul(x, weight, expected, ws)
    failures = []

    def work():
        out = torch.empty(4, 1003)
        for _ in range(200):
            weight.product.matmul(x.data_ptr(), 4, 300, out.data_ptr(), 1003, 0.0, False, 0, 3)
            if not torch.equal(out, expected):
                failures.append(out)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_workers_wake_up_after_they_fell_asleep(ws):
    cpu.set_threads(4)
    weight, x, out, expected = weight_of(BF16(), 1003, 300), torch.randn(1, 300), torch.empty(2, 1003), None
    for pause in (0, 0.00005, 0.0001, 0.00015, 0.001, 0.01) * 20:  # around the 100 microseconds that they spin for
        out.fill_(7)
        matmul.vector_matmul(x, weight, out[:1], ws)
        expected = out.clone() if expected is None else expected
        assert torch.equal(out, expected)
        time.sleep(pause)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_gets_threads_of_its_own():
    # The parent's workers do not exist in the child, so waiting for them would hang.
    code = """
import os, sys, torch
from tightfit.kernels.weight import Weight
weight = Weight(torch.ones(1000, 200).view(torch.uint8), "f32", 0, 1000, 200)
x = torch.ones(1, 200)
def right():
    out = torch.empty(1, 1000)
    weight.product.matmul(x.data_ptr(), 1, 200, out.data_ptr(), 1000, 0.0, False, 0, 3)
    return bool((out == 200).all())
assert right()
child = os.fork()
if child == 0:
    os._exit(0 if right() and right() else 1)
assert os.waitpid(child, 0)[1] == 0
assert right()
print("done")
"""
    assert fresh(code) == "done"


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read on Linux only")
def test_memory_does_not_grow_with_calls(ws):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    weight, x, out = weight_of(Int4(), 512, 512), torch.randn(8, 512), torch.empty(8, 512)
    for _ in range(100):
        matmul.vector_matmul(x, weight, out, ws)
    before = resident()
    for _ in range(5000):
        matmul.vector_matmul(x, weight, out, ws)
    # A leak of 300 bytes a call would show; the measure counts per thread and may be off by 64 pages.
    assert resident() - before < 1 << 20
