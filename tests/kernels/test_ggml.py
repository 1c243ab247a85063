"""Blocks of GGUF files mean what gguf says, and become tiles that hold the same numbers."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tightfit.budget.ledger import Arena, Workspace
from tightfit.catalog import parse_one
from tightfit.errors import CheckpointError
from tightfit.kernels import cpu, ggml
from tightfit.weights.placement.ggml import CONVERTED, FORMAT_OF

HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": ()}


def random_blocks(kind: str, rows: int, cols: int, seed: int, low: float = 2.0**-20, high: float = 4.0) -> torch.Tensor:
    """(rows, bytes) with any codes, and scales of both signs whose sizes lie between ``low`` and ``high``."""
    generator = np.random.default_rng(seed)
    type = ggml.TYPES[kind]
    blocks = generator.integers(0, 256, (rows * cols // type.inputs, type.nbytes), dtype=np.uint8)
    for place in HALVES.get(kind, (0,)):
        numbers = np.exp2(generator.uniform(np.log2(low), np.log2(high), len(blocks)))
        numbers *= generator.choice([-1.0, 1.0], len(blocks))
        blocks[:, place : place + 2] = numbers.astype(np.float16).view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        blocks[:, 0] %= 255
    return torch.from_numpy(blocks.reshape(rows, -1))


def theirs(stored: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType[kind]))


def tiles(stored: torch.Tensor, kind: str, cols: int) -> torch.Tensor:
    fmt = parse_one("weights", FORMAT_OF[kind])
    out = torch.full((fmt.nbytes(len(stored), cols),), 0xA5, dtype=torch.uint8)
    ggml.repack(stored, kind, out)
    return out


def dense(data: torch.Tensor, kind: str, rows: int, cols: int) -> torch.Tensor:
    out = torch.empty(rows, cols)
    matrix = parse_one("weights", FORMAT_OF[kind]).matrix(data, rows, cols)
    matrix.decode(torch.arange(rows), out, Workspace(Arena(64 << 20)))
    return out


@pytest.fixture(autouse=True)
def restored() -> Any:
    chosen = cpu.features()["chosen"]
    yield
    cpu.use(chosen)


def any_rows(kind: str) -> Any:
    return st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**31))


@pytest.mark.parametrize("kind", ggml.TYPES)
def test_numbers_are_those_of_gguf(kind: str) -> None:
    @given(any_rows(kind))
    def check(shape: tuple[int, int, int]) -> None:
        rows, blocks, seed = shape
        cols = blocks * ggml.TYPES[kind].inputs
        stored = random_blocks(kind, rows, cols, seed)
        out = torch.empty(rows, cols)
        ggml.decode(stored, kind, out)
        assert torch.equal(out, theirs(stored, kind))

    check()


@pytest.mark.parametrize("kind", ggml.TYPES)
def test_tiles_hold_the_same_numbers(kind: str) -> None:
    """Exactly; of the K types with scales and offsets rounded to 11 bits, or to 2^-25 where they are small."""

    @given(any_rows(kind))
    def check(shape: tuple[int, int, int]) -> None:
        rows, blocks, seed = shape
        type = ggml.TYPES[kind]
        cols = blocks * type.inputs
        # Where a scale is 2^13 times smaller than the offset beside it, what code 0 stands for is rounded to float32.
        stored = random_blocks(kind, rows, cols, seed, *((0.01, 4.0) if kind in ("Q4_1", "Q5_1") else ()))
        found, expected = dense(tiles(stored, kind, cols), kind, rows, cols), theirs(stored, kind)
        if kind not in CONVERTED:
            assert torch.equal(found, expected)
            return
        codes = ggml.unpack(stored, kind)
        largest = codes.codes.max().float()
        bound = largest * (codes.scales.abs() * 2.0**-11).clamp(min=2.0**-25)
        if codes.offsets is not None:
            bound += (codes.offsets.abs() * 2.0**-11).clamp(min=2.0**-25)
        error = (found - expected).abs().view(rows, -1, type.group)
        assert (error <= 1.001 * bound.unsqueeze(-1)).all()

    check()


@pytest.mark.parametrize("kind", ggml.TYPES)
@pytest.mark.parametrize("low", [2.0**-24, 2.0**-16, 0.1])
def test_the_compiled_code_writes_the_bytes_of_the_reference(kind: str, low: float) -> None:
    if not cpu.available():
        pytest.skip("no compiled kernels")
    for rows, blocks in ((1, 1), (16, 2), (37, 3)):
        cols = blocks * ggml.TYPES[kind].inputs
        stored = random_blocks(kind, rows, cols, rows, low)
        compiled = tiles(stored, kind, cols)
        chosen = cpu.features()["chosen"]
        cpu.use("reference")
        assert torch.equal(tiles(stored, kind, cols), compiled)
        cpu.use(chosen)


@pytest.mark.parametrize("kind", ggml.TYPES)
@pytest.mark.parametrize("name", ["compiled", "reference"])
def test_scales_that_do_not_fit_are_refused(kind: str, name: str) -> None:
    if name == "reference":
        cpu.use(name)
    cols = ggml.TYPES[kind].inputs
    stored = random_blocks(kind, 20, cols, 0)
    place = HALVES.get(kind, (0,))
    for at in place or (0,):
        damaged = stored.clone()
        damaged[3, at : at + 2] = torch.tensor([255, 0x7B if kind in CONVERTED else 0x7C], dtype=torch.uint8)
        with pytest.raises(CheckpointError, match="a scale does not fit"):
            tiles(damaged, kind, cols)
