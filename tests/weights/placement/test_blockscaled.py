"""Codes with scales decode to the numbers that torch and transformers make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tightfit.budget.ledger import Arena, Workspace
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.errors import CheckpointError
from tightfit.model.spec import ModelSpec, Param, Source
from tightfit.weights.formats import Int8
from tightfit.weights.placement import read
from tightfit.weights.placement.places import group_of
from tightfit.weights.placement.resident import Resident

FP8: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3"}
E4M3 = torch.float8_e4m3fn


def whole(checkpoint: Checkpoint, param: Param, expert: int = 0) -> torch.Tensor:
    """All rows of a matrix, from its blocks."""
    rows = torch.full(param.shape, torch.nan)
    for row, block in read.blocks(checkpoint, param, expert):
        rows[row : row + len(block)] = block
    return rows


def fp8_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Every e4m3 number but the two NaNs, at random."""
    codes = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return codes.where(codes & 127 != 127, torch.tensor(0, dtype=torch.uint8)).view(E4M3)


def random_scales(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) + 0.5


def multiplied(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The definition: each block of ``codes`` (..., rows, cols) times its scale."""
    wide = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return codes.float() * wide[..., : codes.shape[-2], : codes.shape[-1]]


# (rows, cols): one block exactly, several, a part of one, and ends in both directions that are not whole.
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (16, 100), (300, 200), (129, 257)])
@pytest.mark.parametrize("block_bytes", [1 << 14, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_blocks_are_torchs_float8_times_their_scales(
    shape: tuple[int, int], block_bytes: int, dtype: torch.dtype, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "BLOCK_BYTES", block_bytes)
    codes, scales = fp8_numbers(*shape), random_scales(-(-shape[0] // 128), -(-shape[1] // 128)).to(dtype)
    checkpoint = write({"a.weight": codes, "a.weight_scale_inv": scales}, weight_block_size=[128, 128], **FP8)
    found = whole(checkpoint, Param("a", shape, Source("a.weight")))
    assert torch.equal(found, multiplied(codes, scales, (128, 128)))


def test_fp8_experts_are_scaled_by_their_own_blocks_in_every_form(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "BLOCK_BYTES", 16 * 4 * 50)  # 16 rows of the matrices below
    block, width, cols = (32, 16), 40, 50  # the second half of the rows starts inside of a block
    stacked, scales = fp8_numbers(3, 2 * width, cols), random_scales(3, 3, 4)
    each, own = fp8_numbers(width, cols, seed=2), random_scales(2, 4)
    tensors = {"e": stacked, "e_scale_inv": scales, "e.1.weight": each, "e.1.weight_scale_inv": own}
    checkpoint = write(tensors, weight_block_size=list(block), **FP8)
    expected = multiplied(stacked, scales, block)
    for expert in range(3):
        up = Param("up", (width, cols), Source("e", start=width, stacked=True), experts=3)
        assert torch.equal(whole(checkpoint, up, expert), expected[expert, width:])
    second = Param("e", (width, cols), Source("e.{expert}.weight"), experts=2)
    assert torch.equal(whole(checkpoint, second, 1), multiplied(each, own, block))


@pytest.mark.parametrize("block_bytes", [1 << 12, 1 << 20])
def test_mxfp4_is_decoded_as_transformers_does(block_bytes: int, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "BLOCK_BYTES", block_bytes)
    experts, width, cols = 3, 37, 96
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (experts, 2 * width, cols // 32, 16), dtype=torch.uint8, generator=generator)
    # Exponents from the smallest: 255 means NaN, and with 254 and 253 the largest code exceeds float32.
    scales = torch.randint(253, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
    scales[0, 0] = 0
    checkpoint = write({"e_blocks": blocks, "e_scales": scales}, quant_method="mxfp4")
    # In float64, since transformers loses the smallest numbers in float32: (experts, cols, rows).
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float64).transpose(1, 2).float()
    for expert in range(experts):
        for start in (0, 1):
            half = Param("h", (width, cols), Source("e_blocks", start=start, step=2, stacked=True), experts=experts)
            assert torch.equal(whole(checkpoint, half, expert), expected[expert, start::2])
        all_rows = Param("a", (2 * width, cols), Source("e_blocks", stacked=True), experts=experts)
        assert torch.equal(whole(checkpoint, all_rows, expert), expected[expert])


def test_codes_are_kept_in_bfloat16_where_the_plan_says_own(write: Any) -> None:
    checkpoint = write(
        {"a.weight": fp8_numbers(64, 48), "a.weight_scale_inv": random_scales(1, 1)},
        weight_block_size=[128, 128],
        **FP8,
    )
    param = Param("a", (64, 48), Source("a.weight"))
    [place] = group_of(checkpoint, ModelSpec("x", 1, 1, (), (param,), 1, 1e-6), "head", "own").places
    assert place.format is not None
    assert place.format.name == "bf16"
    assert place.nbytes == 2 * 64 * 48


class Largest(TorchDispatchMode):
    """Notes the largest memory that any operation of torch was given or gave."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "transposed"])
def test_reading_never_holds_more_than_a_few_blocks(kind: str, write: Any) -> None:
    rows, cols = 2048, 4096  # 32 MiB of float32
    if kind == "fp8":
        tensors = {"a.weight": fp8_numbers(rows, cols), "a.weight_scale_inv": random_scales(16, 32)}
        checkpoint = write(tensors, weight_block_size=[128, 128], **FP8)
        param = Param("a", (rows, cols), Source("a.weight"))
    elif kind == "mxfp4":
        blocks = torch.zeros(1, 2 * rows, cols // 32, 16, dtype=torch.uint8)
        checkpoint = write(
            {"e_blocks": blocks, "e_scales": torch.zeros(blocks.shape[:-1], dtype=torch.uint8)}, quant_method="mxfp4"
        )
        param = Param("e", (rows, cols), Source("e_blocks", step=2, stacked=True), experts=1)
    else:
        checkpoint = write({"e": torch.zeros(1, cols, 2 * rows, dtype=torch.bfloat16)})
        param = Param("e", (rows, cols), Source("e", step=2, transposed=True, stacked=True), experts=1)
    with Largest() as largest:
        for _ in read.blocks(checkpoint, param, 0):
            pass
    assert 0 < largest.nbytes <= max(read.BLOCK_BYTES, read.SLAB_BYTES)


def test_codes_without_fitting_scales_are_refused(write: Any) -> None:
    codes = fp8_numbers(64, 48)
    param = Param("a", (64, 48), Source("a.weight"))
    config = FP8 | {"weight_block_size": [32, 32]}
    with pytest.raises(CheckpointError, match=r"no tensor 'a\.weight_scale_inv'"):
        read.tensor_of(write({"a.weight": codes}, **config), param)
    for scales in (random_scales(2, 1), random_scales(1, 2), random_scales(2, 2).half()):
        checkpoint = write({"a.weight": codes, "a.weight_scale_inv": scales}, **config)
        with pytest.raises(CheckpointError, match=r"a.weight_scale_inv.*call for .* \[2, 2\]"):
            read.tensor_of(checkpoint, param)
    packed = {"e_blocks": torch.zeros(2, 8, 1, 16, dtype=torch.uint8)}
    experts = Param("e", (8, 32), Source("e_blocks", stacked=True), experts=2)
    with pytest.raises(CheckpointError, match="no tensor 'e_scales'"):
        read.tensor_of(write(packed, quant_method="mxfp4"), experts)
    packed["e_scales"] = torch.zeros(2, 8, 2, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"'e_scales'.*U8 \[2, 8, 1\]"):
        read.tensor_of(write(packed, quant_method="mxfp4"), experts)


def test_codes_that_the_config_does_not_declare_are_refused(write: Any) -> None:
    tensors = {"a.weight": fp8_numbers(64, 48), "b_blocks": torch.zeros(2, 8, 1, 16, dtype=torch.uint8)}
    checkpoint = write(tensors)
    with pytest.raises(CheckpointError, match="type F8_E4M3"):
        read.tensor_of(checkpoint, Param("a", (64, 48), Source("a.weight")))
    vector = write({"v": fp8_numbers(64)}, weight_block_size=[32, 32], **FP8)
    with pytest.raises(CheckpointError, match="type F8_E4M3"):
        read.tensor_of(vector, Param("v", (64,), Source("v")))
    with pytest.raises(CheckpointError, match="type U8"):
        read.tensor_of(checkpoint, Param("b", (8, 32), Source("b_blocks", stacked=True), experts=2))


def test_int8_codes_of_a_model_in_fp8_come_from_the_decoded_numbers(write: Any) -> None:
    codes, scales = fp8_numbers(40, 64), random_scales(1, 1)
    checkpoint = write({"a.weight": codes, "a.weight_scale_inv": scales}, weight_block_size=[128, 128], **FP8)
    expected = multiplied(codes, scales, (128, 128))
    spec = ModelSpec("x", 40, 64, (), (Param("a", (40, 64), Source("a.weight")),), 8, 1e-6)
    resident = Resident(checkpoint, spec, "int8", {}, torch.float32, Arena(1 << 16))
    resident.load()
    encoded = torch.empty(Int8().nbytes(40, 64), dtype=torch.uint8)
    Int8().encode(expected, encoded, 0)
    numbers = [torch.empty(40, 64) for _ in range(2)]
    for matrix, out in zip((resident.model["a"], Int8().matrix(encoded, 40, 64)), numbers, strict=True):
        matrix.decode(torch.arange(40), out, Workspace(Arena(1 << 20)))
    assert torch.equal(*numbers)
