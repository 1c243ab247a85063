"""How matrices are stored: sizes, layouts, and what is lost."""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tightfit.budget.ledger import Arena, Workspace
from tightfit.errors import CheckpointError, UsageError
from tightfit.weights.formats import BF16, F16, F32, Int4, Int8

DENSE = [F32(), F16(), BF16()]
TILED = [Int8(), Int4(), Int8(group=16), Int4(group=16), Int8(group=128), Int4(group=40)]
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

groups = st.sampled_from(range(16, 129, 8))
tiled = st.builds(Int8, groups) | st.builds(Int4, groups)
sizes = st.integers(1, 70), st.integers(1, 150)
magnitudes = st.sampled_from([1.0, 1e-30, 1e-20, 1e20, 1e30])


def encoded(fmt, weights):
    data = torch.empty(fmt.nbytes(*weights.shape), dtype=torch.uint8)
    fmt.encode(weights, data, 0)
    return data


def decoded(fmt, weights):
    ws, out = Workspace(Arena(16 << 20)), torch.empty(weights.shape)
    fmt.matrix(encoded(fmt, weights), *weights.shape).decode(torch.arange(len(weights)), out, ws)
    return out


def by_the_book(fmt, data, rows, cols):
    """The documented layout, read one weight at a time."""
    data, tile_bytes = bytes(data.numpy()), fmt.tile_bytes
    tiles_across = -(-cols // fmt.group)
    out = torch.empty(rows, cols)
    for row in range(rows):
        for col in range(cols):
            start = (row // 16 * tiles_across + col // fmt.group) * tile_bytes
            r, i = row % 16, col % fmt.group
            if fmt.kind == "int8":
                code = int.from_bytes(data[start + i // 4 * 64 + r * 4 + i % 4 :][:1], "little", signed=True)
            else:
                byte = data[start + i // 8 * 64 + r * 4 + i % 4]
                code = (byte >> 4 if i % 8 >= 4 else byte & 15) - 8
            scale = torch.frombuffer(bytearray(data[start + tile_bytes - 32 + 2 * r :][:2]), dtype=torch.bfloat16)
            out[row, col] = code * scale.float().item()
    return out


@pytest.mark.parametrize("fmt", DENSE, ids=lambda fmt: fmt.name)
def test_dense_formats_keep_their_own_numbers(fmt):
    weights = torch.randn(37, 53).to(TORCH[fmt.name])
    assert torch.equal(encoded(fmt, weights).view(TORCH[fmt.name]).view(37, 53), weights)
    assert torch.equal(decoded(fmt, weights), weights.float())


def test_sizes_are_exact():
    assert F32().nbytes(3, 5) == 60
    assert F16().nbytes(3, 5) == BF16().nbytes(3, 5) == 30
    # 33 rows are 3 tiles, 65 inputs 3 groups of 32: 9 tiles of 16 * 32 codes and 16 scales of 2 bytes
    assert Int8().nbytes(33, 65) == 9 * (512 + 32)
    assert Int4().nbytes(33, 65) == 9 * (256 + 32)
    assert Int4(group=128).nbytes(16, 128) == 1024 + 32


@given(tiled, *sizes, st.integers(0, 2**32))
def test_tiles_have_the_documented_layout(fmt, rows, cols, seed):
    weights = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    data = encoded(fmt, weights)
    assert torch.equal(decoded(fmt, weights), by_the_book(fmt, data, rows, cols))


@given(tiled, *sizes, st.integers(0, 2**32), magnitudes)
def test_rounding_is_off_by_half_a_step_at_most(fmt, rows, cols, seed, magnitude):
    weights = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * magnitude
    difference = (decoded(fmt, weights) - weights).double().abs()
    padded = torch.zeros(rows, -(-cols // fmt.group) * fmt.group, dtype=torch.double)
    padded[:, :cols] = weights.double()
    largest = padded.view(rows, -1, fmt.group).abs().amax(-1, keepdim=True)
    largest = largest.expand(-1, -1, fmt.group).reshape(rows, -1)[:, :cols]
    # A step is the group's largest value over 127 or 8; the scale's rounding to bfloat16 changes it by 2^-8 at most.
    step = largest / (127 if fmt.kind == "int8" else 8)
    bound = step / 2 * (1 + 2**-8)
    if fmt.kind == "int4":
        # -8 has no opposite: what is beyond 7.5 steps on the other side becomes 7, off by 1 step and what rounding the
        # scale moves a value of 8 steps by, 8 * 2^-8.
        bound = torch.where(weights.double().abs() <= 7.4 * step, bound, step * (1 + 2**-5))
    assert (difference <= bound).all()


@pytest.mark.parametrize("fmt", TILED, ids=str)
def test_the_largest_of_a_group_keeps_its_value(fmt):
    weights = torch.randn(16, fmt.group)
    largest = weights.abs().argmax(-1, keepdim=True)
    kept, original = decoded(fmt, weights).gather(1, largest), weights.gather(1, largest)
    # Only the scale is rounded: 2^-8 of the value, and code 127 may stand for a scale that was rounded up.
    assert torch.allclose(kept, original, rtol=2**-8, atol=0)


@pytest.mark.parametrize("fmt", TILED, ids=str)
def test_zeros_and_values_below_what_a_scale_can_hold_are_zeros(fmt):
    weights = torch.zeros(17, 100)
    weights[3] = 1e-39  # a subnormal float32
    weights[5] = -1e-45  # the smallest
    weights[7, 2] = 1.0
    out = decoded(fmt, weights)
    assert abs(out[7, 2] - 1) < 2**-8  # a bfloat16 scale
    out[7, 2] = 0
    assert not out.any()


@pytest.mark.parametrize("fmt", TILED, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(fmt, bad):
    weights = torch.randn(40, 100)
    weights[35, 99] = bad
    with pytest.raises(CheckpointError, match="not a finite number"):
        encoded(fmt, weights)


def test_float16_refuses_what_it_cannot_hold():
    assert encoded(F16(), torch.full((1, 1), -65504.0)).view(torch.float16).item() == -65504.0
    for weights in (torch.full((1, 2), 7e4), torch.full((1, 2), -7e4, dtype=torch.bfloat16)):
        with pytest.raises(CheckpointError, match="float16"):
            encoded(F16(), weights)


@pytest.mark.parametrize("fmt", DENSE + TILED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_matrix_may_be_written_block_by_block_from_any_type(fmt, dtype):
    weights = torch.randn(75, 90).to(dtype)
    data = torch.full((fmt.nbytes(75, 90),), 255, dtype=torch.uint8)
    for row, stop in ((48, 75), (0, 16), (16, 48)):
        fmt.encode(weights[row:stop], data, row)
    assert torch.equal(data, encoded(fmt, weights.float()))


@pytest.mark.parametrize("group", [0, 8, 15, 20, 136, -32])
def test_groups_that_no_kernel_reads_are_refused(group):
    for cls in (Int8, Int4):
        with pytest.raises(UsageError, match="groups of"):
            cls(group=group)


@pytest.mark.parametrize("fmt", [BF16(), Int4()], ids=str)
def test_a_matrix_of_the_wrong_size_is_refused(fmt):
    n = fmt.nbytes(20, 40)
    for data in (torch.zeros(n - 1, dtype=torch.uint8), torch.zeros(2 * n, dtype=torch.uint8)[::2], torch.zeros(n)):
        with pytest.raises(ValueError, match="20 x 40"):
            fmt.matrix(data, 20, 40)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
@pytest.mark.parametrize("fmt", [Int8(), Int4()], ids=str)
def test_encoding_takes_bounded_scratch(fmt):
    def peak():
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) << 10

    weights = torch.randn(2048, 4096, dtype=torch.bfloat16)
    data = encoded(fmt, weights)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    fmt.encode(weights, data, 0)
    block = weights.numel() * 4  # in float32: 32 MiB, so that the measure's pages and torch's own do not count
    assert peak() - before < 2 * block


@example(0, 0)
@given(st.integers(0, 75), st.integers(0, 75))
def test_a_slice_is_the_rows_without_a_copy(start, stop):
    start, stop = sorted((start, stop))
    weights = torch.randn(75, 90)
    for fmt in (BF16(), Int8(), Int4(group=16)):
        data, ws = encoded(fmt, weights), Workspace(Arena(16 << 20))
        matrix = fmt.matrix(data, 75, 90)
        part = matrix.slice(start, stop)
        assert (part.rows, part.cols, part.format) == (stop - start, 90, fmt)
        assert part.data.untyped_storage().data_ptr() == data.data_ptr()
        whole, rows = torch.empty(75, 90), torch.empty(stop - start, 90)
        matrix.decode(torch.arange(75), whole, ws)
        part.decode(torch.arange(stop - start), rows, ws)
        assert torch.equal(rows, whole[start:stop])
        middle = part.slice(part.rows // 3, part.rows)
        again = torch.empty(middle.rows, 90)
        middle.decode(torch.arange(middle.rows), again, ws)
        assert torch.equal(again, rows[part.rows // 3 :])


def test_a_slice_outside_of_the_matrix_is_refused():
    matrix = F32().matrix(torch.zeros(4 * 4 * 4, dtype=torch.uint8), 4, 4)
    for start, stop in ((-1, 2), (0, 5), (3, 2)):
        with pytest.raises(IndexError, match="of a matrix of 4 rows"):
            matrix.slice(start, stop)
