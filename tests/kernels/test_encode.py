"""The compiled encoder writes the bytes of the torch reference, whatever the shape, type and size of the numbers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.errors import CheckpointError
from tightfit.kernels import cpu, encode, encode_reference
from tightfit.kernels.layout import tile_nbytes

COMPILED = cpu.supported()[:-1]
pytestmark = pytest.mark.skipif(not COMPILED, reason="installed without the compiled kernels")

INTEGERS = ("int8", "int6", "int5", "int4", "int3", "int2")
# (kind, asymmetric, exponent bits)
KINDS = [(kind, asymmetric, 0) for kind in INTEGERS for asymmetric in (False, True)]
KINDS += [("nf4", False, 0), ("fp4", False, 0), ("ternary", False, 0)]
KINDS += [("fp8", False, exponent) for exponent in (2, 3, 4, 5)]
TYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    chosen = cpu.features()["chosen"]
    yield
    cpu.use(chosen)


def tiles(block: torch.Tensor, kind: str, group: int, asymmetric: bool, exponent: int, how: Any) -> Any:
    """(bytes, squared error); every byte is written, whatever was there before."""
    count = -(-len(block) // 16) * -(-block.shape[1] // group)
    out = torch.full((count * tile_nbytes(kind, group, asymmetric),), 0xA5, dtype=torch.uint8)
    return out, how(block, kind, group, asymmetric, exponent, out)


def check(block: torch.Tensor, kind: str, group: int, asymmetric: bool, exponent: int) -> None:
    expected, error = tiles(block, kind, group, asymmetric, exponent, encode_reference.encode)
    for isa in COMPILED:
        cpu.use(isa)
        found, found_error = tiles(block, kind, group, asymmetric, exponent, encode.encode)
        assert torch.equal(found, expected), isa
        assert found_error == pytest.approx(error, rel=1e-6, abs=1e-300)  # added up in another order


@pytest.mark.parametrize(("kind", "asymmetric", "exponent"), KINDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_every_level_writes_the_bytes_of_the_reference(
    kind: str, asymmetric: bool, exponent: int, data: st.DataObject
) -> None:
    multiple = 48 if kind == "ternary" else 16
    group = multiple * data.draw(st.integers(1, 9), "group")
    rows, cols = data.draw(st.integers(1, 40), "rows"), data.draw(st.integers(1, 300), "cols")
    dtype = data.draw(st.sampled_from(TYPES), "type")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30), "seed"))
    block = torch.randn(rows, cols, generator=generator)
    block *= torch.exp(2 * torch.randn(rows, 1, generator=generator))  # rows of very different sizes
    if data.draw(st.booleans(), "outliers"):
        block = block.clamp(-30, 30) ** 3  # float16 ends at 65504
    if data.draw(st.booleans(), "zeros"):
        block = block.where(torch.rand(rows, cols, generator=generator) < 0.3, 0.0)
    check(block.to(dtype), kind, group, asymmetric, exponent)


# float32's largest and smallest numbers, subnormal ones, both zeros, and groups of one number only.
EXTREMES = {
    "the largest": torch.tensor([3.4e38, -3.4e38, 1.0, -1.0]).repeat(17, 8),
    "subnormal": torch.tensor([1e-45, -3e-42, 1e-39, 0.0]).repeat(17, 8),
    "just above subnormal": torch.tensor([1.3e-38, -2e-38, 0.0, 5e-38]).repeat(17, 8),
    "zeros of both signs": torch.tensor([0.0, -0.0]).repeat(17, 16),
    "all alike": torch.full((17, 32), -0.3),
    "one number among zeros": torch.eye(17, 32),
    "a huge offset": 1e6 + torch.arange(17 * 32).view(17, 32) % 7,
}


@pytest.mark.parametrize(("kind", "asymmetric", "exponent"), KINDS)
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_numbers_give_the_bytes_of_the_reference(name: str, kind: str, asymmetric: bool, exponent: int) -> None:
    check(EXTREMES[name], kind, 48 if kind == "ternary" else 16, asymmetric, exponent)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_half_and_bfloat16_is_read_as_the_number_that_it_is(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        numbers = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int32).view(dtype)
    else:
        numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = numbers.where(numbers.isfinite(), torch.tensor(0, dtype=dtype)).view(-1, 64)
    check(finite, "int8", 16, False, 0)


@pytest.mark.parametrize("isa", COMPILED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_number_that_is_not_finite_is_refused_wherever_it_is(isa: str, bad: float, dtype: torch.dtype) -> None:
    cpu.use(isa)
    for row, col in ((0, 0), (18, 36), (7, 20), (16, 31)):
        block = torch.zeros(19, 37, dtype=dtype)
        block[row, col] = bad
        with pytest.raises(CheckpointError, match="not a finite number"):
            tiles(block, "int4", 32, False, 0, encode.encode)


@pytest.mark.parametrize("isa", COMPILED)
def test_rows_that_do_not_follow_each_other_and_other_types_are_encoded_too(isa: str) -> None:
    cpu.use(isa)
    wide = torch.randn(40, 100)
    expected, _ = tiles(wide[::2, :64].contiguous(), "int4", 32, False, 0, encode.encode)
    for block in (wide[::2, :64], wide[::2, :64].double(), wide[::2, :64].T.contiguous().T):
        assert torch.equal(tiles(block, "int4", 32, False, 0, encode.encode)[0], expected)


def test_memory_of_the_wrong_size_and_groups_that_no_tile_has_are_refused() -> None:
    with pytest.raises(ValueError, match="tiles of 16 x 32"):
        encode.encode(torch.zeros(16, 32), "int4", 32, False, 0, torch.zeros(287, dtype=torch.uint8))
    for kind, group, exponent in (("int4", 8, 0), ("ternary", 32, 0), ("fp8", 32, 7)):
        with pytest.raises(ValueError, match=r"groups are multiples|bits of exponent"):
            tiles(torch.zeros(16, 32), kind, group, False, exponent, encode.encode)


def test_threads_that_encode_at_the_same_time_do_not_meet() -> None:
    blocks = [torch.randn(64, 256) for _ in range(4)]
    expected = [tiles(block, "int4", 32, False, 0, encode.encode)[0] for block in blocks]
    found: dict[int, torch.Tensor] = {}

    def run(index: int) -> None:
        for _ in range(20):
            found[index] = tiles(blocks[index], "int4", 32, False, 0, encode.encode)[0]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in range(4))
