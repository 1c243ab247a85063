"""How matrices are stored: sizes, layouts, slices, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.weights.formats.stored import (
    HALVES,
    INTEGERS,
    LOSSY,
    TILED,
    blocks_of,
    decoded,
    dense,
    encoded,
    matrix_of,
    normal,
)

from tightfit.budget.ledger import Arena, Workspace
from tightfit.errors import CheckpointError, UsageError
from tightfit.kernels import matmul
from tightfit.kernels.ops import dry
from tightfit.kernels.weight import Weight
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
    Ternary,
)

DENSE = [F32(), F16(), BF16()]
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
ids = {"ids": str}

groups = st.sampled_from([0, *range(16, 129, 16)])
tiled = st.one_of(
    *(st.builds(cls, groups, st.booleans()) for cls in INTEGERS),
    st.builds(NF4, groups),
    st.builds(FP4, groups),
    st.builds(FP8, st.sampled_from([2, 3, 4, 5]), groups),
    st.builds(Ternary, st.sampled_from([0, 48, 96])),
)
sizes = st.integers(1, 40), st.integers(1, 150)


def floating(code, exponent_bits, mantissa_bits):
    """The number that a code of sign, exponent and mantissa stands for, after IEEE 754 without infinities."""
    mantissa, rest = code % (1 << mantissa_bits), code >> mantissa_bits
    field, sign = rest % (1 << exponent_bits), rest >> exponent_bits
    bias = (1 << (exponent_bits - 1)) - 1
    magnitude = ((field > 0) + mantissa / (1 << mantissa_bits)) * 2.0 ** (max(field, 1) - bias)
    return -magnitude if sign else magnitude


def field(plane, bits, r, i):
    """The ``bits`` of row r's code i in a plane."""
    if bits == 1:
        return int.from_bytes(plane[i // 4 * 8 :][:8], "little") >> (r * 4 + i % 4) & 1
    line = 4 * 8 // bits  # codes
    return plane[i // line * 64 + r * 4 + i % 4] >> (i % line // 4 * bits) & ((1 << bits) - 1)


def level_of(kind, exponent, tile, group, r, i):
    """What is multiplied with the scale for row r's input i of a tile."""
    if kind == "ternary":
        run, half, t, k = tile[i // 24 * 80 :], i % 24 // 12, i % 12 // 4, i % 4
        v = field(run, 4, r, 4 * half + k) * (-1 if field(run[64:], 1, r, 4 * half + k) else 1)
        return (v + 13) // 3 ** (2 - t) % 3 - 1
    if kind == "int8":
        return (field(tile, 8, r, i) + 128) % 256 - 128
    if kind == "fp8":
        return floating(field(tile, 8, r, i), exponent, 7 - exponent)
    if kind == "fp4":
        return floating(field(tile, 4, r, i), 2, 1)
    if kind == "nf4":
        return NF4_TABLE[field(tile, 4, r, i)]
    low, high = {"int6": (4, 2), "int5": (4, 1), "int4": (4, 0), "int3": (2, 1), "int2": (2, 0)}[kind]
    code = field(tile, low, r, i)
    if high:
        code += field(tile[group * low * 2 :], high, r, i) << low
    return code - (1 << (low + high - 1))


def by_the_book(fmt, data, rows, cols):
    """The documented layout, read one weight at a time."""
    data = bytes(data.numpy())
    header = 64 if fmt.kind == "fp8" else 0
    multiple = 48 if fmt.kind == "ternary" else 32
    group = fmt.group or -(-cols // multiple) * multiple
    bits = {"int8": 8, "fp8": 8, "int6": 6, "int5": 5, "int3": 3, "int2": 2, "ternary": 5 / 3}.get(fmt.kind, 4)
    code_bytes = round(16 * group * bits / 8)
    tile_bytes = code_bytes + (64 if fmt.asymmetric else 32)

    def number(start):
        two = data[start : start + 2]
        return np.float32(np.frombuffer(two, np.float16)[0]) if fmt.half_scales else bfloat16(two)

    def bfloat16(two):
        return np.frombuffer(b"\0\0" + two, np.float32)[0]

    out = torch.empty(rows, cols)
    for row in range(rows):
        for col in range(cols):
            start = header + (row // 16 * -(-cols // group) + col // group) * tile_bytes
            r, end = row % 16, start + tile_bytes
            level = np.float32(level_of(fmt.kind, data[0], data[start:end], group, r, col % group))
            scale = number(start + code_bytes + 2 * r)
            offset = number(end - 32 + 2 * r) if fmt.asymmetric else np.float32(0)
            if fmt.asymmetric and fmt.half_scales:  # that of the lowest code
                offset += {"int8": 128, "int5": 16, "int4": 8}[fmt.kind] * scale
            out[row, col] = float(level * scale + offset)
    return out


# bitsandbytes' table, which QLoRA's authors published.
# fmt: off
NF4_TABLE = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]
# fmt: on


@pytest.mark.parametrize("fmt", DENSE, **ids)
def test_dense_formats_keep_their_own_numbers(fmt):
    weights = normal(37, 53).to(TORCH[fmt.name])
    assert torch.equal(encoded(fmt, weights).view(TORCH[fmt.name]).view(37, 53), weights)
    assert torch.equal(decoded(fmt, weights), weights.float())


@pytest.mark.parametrize(
    ("fmt", "nbytes"),
    [
        # 33 rows are 3 tiles, 65 inputs 3 groups of 32: 9 tiles of codes and of 16 scales of 2 bytes
        (F32(), 33 * 65 * 4),
        (F16(), 33 * 65 * 2),
        (BF16(), 33 * 65 * 2),
        (Int8(), 9 * (16 * 32 + 32)),
        (Int6(), 9 * (16 * 32 * 6 // 8 + 32)),
        (Int5(), 9 * (16 * 32 * 5 // 8 + 32)),
        (Int4(), 9 * (16 * 32 // 2 + 32)),
        (Int3(), 9 * (16 * 32 * 3 // 8 + 32)),
        (Int2(), 9 * (16 * 32 // 4 + 32)),
        (Int4(symmetric=False), 9 * (16 * 32 // 2 + 64)),  # and 16 offsets
        (Int4(group=128), 3 * (16 * 128 // 2 + 32)),
        (Int4(group=0), 3 * (16 * 96 // 2 + 32)),  # rows are filled up to 96 inputs
        (NF4(), 9 * (16 * 32 // 2 + 32)),
        (FP4(), 9 * (16 * 32 // 2 + 32)),
        (FP8(group=32), 64 + 9 * (16 * 32 + 32)),
        (FP8(), 64 + 3 * (16 * 96 + 32)),
        (Ternary(), 3 * (16 * 96 // 3 * 5 // 8 + 32)),
        (Ternary(group=48), 3 * 2 * (16 * 48 // 3 * 5 // 8 + 32)),
        # 1 of 65 columns, in a header of 64 bytes and as 48 numbers of 2
        (LlmInt8(), 64 + 3 * (16 * 96 + 32) + 48 * 2),
        # bits of 65 inputs in two words of 8 bytes, 33 numbers of 2 filled up to 36
        (Pruned(), 33 * (16 + 72)),
    ],
    ids=lambda value: str(value),
)
def test_sizes_are_exact(fmt, nbytes):
    assert fmt.nbytes(33, 65) == nbytes


@settings(max_examples=60)
@given(tiled, *sizes, st.integers(0, 2**32))
def test_tiles_have_the_documented_layout(fmt, rows, cols, seed):
    weights = normal(rows, cols, seed)
    data = encoded(fmt, weights)
    assert torch.equal(dense(fmt.matrix(data, rows, cols)), by_the_book(fmt, data, rows, cols))


@pytest.mark.parametrize("fmt", TILED, **ids)
def test_zeros_and_values_below_what_a_scale_can_hold_are_zeros(fmt):
    weights = torch.zeros(17, 100)
    weights[3] = 1e-39  # a subnormal float32
    weights[5] = -1e-45  # the smallest
    weights[7, 2] = 1.0
    out = decoded(fmt, weights)
    assert abs(out[7, 2] - 1) < 2**-8  # a bfloat16 scale
    assert not out[[row for row in range(17) if row != 7]].any()


@pytest.mark.parametrize("fmt", [fmt for fmt in LOSSY if fmt not in HALVES], **ids)
@pytest.mark.parametrize("exponent", [100, 60, -60, -100])
def test_a_power_of_two_changes_nothing_but_the_scales(fmt, exponent):
    # Squares of these numbers are infinite or zero in float32; 2^-100 / 57344 is still a normal bfloat16.
    weights, power = normal(32, 100), 2.0**exponent
    assert torch.equal(decoded(fmt, weights * power), decoded(fmt, weights) * power)


@pytest.mark.parametrize("fmt", LOSSY, **ids)
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


@pytest.mark.parametrize("fmt", DENSE + LOSSY, **ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_matrix_may_be_written_block_by_block_from_any_type(fmt, dtype):
    weights = normal(75, 90).to(dtype)
    data = torch.full((fmt.nbytes(75, 90),), 255, dtype=torch.uint8)
    fmt.begin(data, (75, 90), blocks_of(weights))
    for row, stop in ((48, 75), (0, 16), (16, 48)):
        fmt.encode(weights[row:stop], data, row)
    whole = fmt.matrix(encoded(fmt, weights.float()), 75, 90)
    assert torch.equal(dense(fmt.matrix(data, 75, 90)), dense(whole))


@pytest.mark.parametrize("group", [8, 15, 20, 40, 136, -32])
def test_groups_that_no_kernel_reads_are_refused(group):
    for cls in (*INTEGERS, NF4, FP4, FP8, Ternary):
        with pytest.raises(UsageError, match="groups of"):
            cls(group=group)
    with pytest.raises(UsageError, match="multiple of 48"):
        Ternary(group=32)


@pytest.mark.parametrize("fmt", [BF16(), Int4(), FP8(), LlmInt8(), Pruned()], **ids)
def test_a_matrix_of_the_wrong_size_is_refused(fmt):
    n = fmt.nbytes(20, 40)
    for data in (torch.zeros(n - 1, dtype=torch.uint8), torch.zeros(2 * n, dtype=torch.uint8)[::2], torch.zeros(n)):
        with pytest.raises(ValueError, match="20 x 40"):
            fmt.matrix(data, 20, 40)


@pytest.mark.parametrize("fmt", DENSE + LOSSY, **ids)
def test_a_matrix_over_memory_that_nothing_was_written_to_can_be_rehearsed(fmt):
    matrix = fmt.matrix(torch.zeros(fmt.nbytes(20, 40), dtype=torch.uint8), 20, 40)
    ws, out = Workspace(Arena(1 << 20)), torch.empty(2, 20)
    with dry():
        matrix.matmul(torch.zeros(2, 40), out, ws)
    matrix.matmul(torch.ones(2, 40), out, ws)
    assert not out.any()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
@pytest.mark.parametrize(
    "fmt", [Int4(), Int2(group=0, symmetric=False), NF4(), FP8(), Ternary(), LlmInt8(), Pruned()], **ids
)
def test_encoding_takes_bounded_scratch(fmt):
    def peak():
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) << 10

    weights = torch.randn(64, 8192, dtype=torch.bfloat16)
    data = torch.zeros(fmt.nbytes(64, 8192), dtype=torch.uint8)
    fmt.begin(data, (64, 8192), blocks_of(weights))
    fmt.encode(weights[:32], data, 0)  # what is allocated once does not count
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    fmt.encode(weights[32:], data, 32)  # 1 MiB in float32
    assert peak() - before < 10 << 20  # eight times that, and pages that malloc holds


@example(0, 0)
@settings(max_examples=20)
@given(st.integers(0, 75), st.integers(0, 75))
def test_a_slice_is_the_rows_without_a_copy(start, stop):
    start, stop = sorted((start, stop))
    weights = normal(75, 90)
    for fmt in (BF16(), Int8(), Int5(16, symmetric=False), Int4(group=0), FP8(3), Ternary(), LlmInt8(), Pruned()):
        matrix = matrix_of(fmt, weights)
        part = matrix.slice(start, stop)
        assert (part.rows, part.cols, part.format) == (stop - start, 90, fmt)
        rows, whole = dense(part), dense(matrix)
        assert torch.equal(rows, whole[start:stop])
        assert torch.equal(dense(part.slice(part.rows // 3, part.rows)), rows[part.rows // 3 :])


def test_a_slice_lies_where_the_matrix_does():
    for fmt in (F32(), Int4(), FP8(), Pruned()):
        data = encoded(fmt, normal(64, 64))
        part = fmt.matrix(data, 64, 64).slice(17, 40)
        assert part.weight.data.untyped_storage().data_ptr() == data.data_ptr()
        assert part.weight.data.numel() <= fmt.nbytes(48, 64)


@pytest.mark.parametrize("fmt", [F32(), Int8(), LlmInt8(), Pruned()], **ids)
def test_a_slice_outside_of_the_matrix_is_refused(fmt):
    matrix = matrix_of(fmt, normal(4, 40))
    for start, stop in ((-1, 2), (0, 5), (3, 2)):
        with pytest.raises(IndexError, match="of a matrix of 4 rows"):
            matrix.slice(start, stop)


@pytest.mark.parametrize("fmt", [fmt for fmt in TILED if not fmt.asymmetric], **ids)
def test_rows_and_columns_that_fill_up_tiles_are_zeros(fmt):
    group = fmt.tile_group(33)
    stored = matrix_of(fmt, normal(17, 33)).weight
    padded = Weight(stored.data, stored.kind, group, 32, -(-33 // group) * group, settings=stored.settings)
    out = torch.empty(32, padded.cols)
    matmul.decode_block(padded, 0, 32, out, Workspace(Arena(1 << 20)))
    assert out[:17, :33].any()
    assert not out[17:].any()
    assert not out[:, 33:].any()
