"""Parameters are read from the part of a tensor where they stand, in whatever order it lies there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.errors import CheckpointError
from tightfit.model.spec import ModelSpec, Param, Source
from tightfit.weights.placement import read

EXPERTS, ROWS, COLS = 3, 53, 20


def whole(checkpoint: Checkpoint, param: Param, expert: int = 0) -> torch.Tensor:
    """All rows of a parameter, from its blocks."""
    found = [(row, block.clone()) for row, block in read.blocks(checkpoint, param, expert)]
    assert [row for row, _ in found] == [sum(len(block) for _, block in found[:at]) for at in range(len(found))]
    return torch.cat([block for _, block in found]).view(param.shape)


@pytest.fixture(params=[1 << 8, 1 << 20], ids=["small blocks", "one block"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Many blocks of 16 rows, those of transposed tensors from slabs of 7 lines, or one block of everything."""
    monkeypatch.setattr(read, "BLOCK_BYTES", request.param)
    if request.param == 1 << 8:
        monkeypatch.setattr(read, "SLAB_BYTES", 7 * 2 * ROWS * 2)
    return int(request.param)


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_rows_come_from_where_the_source_says(
    start: int, step: int, transposed: bool, stacked: bool, sizes: int, write: Any
) -> None:
    stored = torch.randn(EXPERTS, 2 * ROWS, COLS, generator=torch.Generator().manual_seed(0)).bfloat16()
    lying = (stored.transpose(1, 2) if transposed else stored).contiguous()
    source = Source("e" if stacked else "e.{expert}", start, step, transposed, stacked)
    checkpoint = write({"e": lying} if stacked else {f"e.{expert}": lying[expert].clone() for expert in range(EXPERTS)})
    param = Param("e", (ROWS, COLS), source, experts=EXPERTS)
    for expert in range(EXPERTS):
        assert torch.equal(whole(checkpoint, param, expert), stored[expert, start : start + ROWS * step : step])


def test_vectors_of_experts_are_read_in_one_piece(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    biases = torch.randn(EXPERTS, 2 * ROWS)
    checkpoint = write({"b": biases})
    reads = []
    read_into = checkpoint.read_into
    monkeypatch.setattr(checkpoint, "read_into", lambda *args, **more: (reads.append(args), read_into(*args, **more)))
    for start in (0, 1):
        up = Param("b", (ROWS,), Source("b", start=start, step=2, stacked=True), experts=EXPERTS)
        assert torch.equal(whole(checkpoint, up, 2), biases[2, start::2])
    assert len(reads) == 2


def test_transposed_tensors_are_read_in_few_large_pieces(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cols, rows = 512, 8192  # 8 MiB: read in four blocks, each from eight slabs of 1 MiB
    checkpoint = write({"e": torch.zeros(cols, rows, dtype=torch.bfloat16)})
    reads: list[int] = []
    monkeypatch.setattr(checkpoint, "read_into", lambda info, start, buffer, again: reads.append(len(buffer)))
    for _ in read.blocks(checkpoint, Param("e", (rows, cols), Source("e", transposed=True)), 0):
        pass
    assert reads == [1 << 20] * 32


def spec_of(*params: Param) -> ModelSpec:
    return ModelSpec("x", 1, 1, (), params, 1, 1e-6)


def test_a_tensor_of_another_shape_than_the_config_describes_is_refused(write: Any) -> None:
    checkpoint = write({"e": torch.zeros(EXPERTS, 2 * ROWS, COLS), "m": torch.zeros(ROWS, COLS)})
    gate = Param("g", (ROWS, COLS), Source("e", stacked=True), experts=EXPERTS)
    up = Param("u", (ROWS, COLS), Source("e", start=ROWS, stacked=True), experts=EXPERTS)
    read.check(checkpoint, spec_of(gate, up))
    with pytest.raises(CheckpointError, match=r"'e' .* has 106 rows, but config.json describes 53"):
        read.check(checkpoint, spec_of(gate))
    wrong = [
        Param("e", (ROWS, COLS), Source("e", stacked=True), experts=EXPERTS + 1),
        Param("e", (ROWS, COLS + 1), Source("e", stacked=True), experts=EXPERTS),
        Param("e", (ROWS, COLS), Source("e", start=ROWS + 1, stacked=True), experts=EXPERTS),
        Param("e", (ROWS, COLS), Source("e", transposed=True, stacked=True), experts=EXPERTS),
        Param("e", (ROWS, COLS), Source("e")),
        Param("m", (COLS, ROWS), Source("m")),
        Param("m", (ROWS * COLS,), Source("m")),
    ]
    for param in wrong:
        with pytest.raises(CheckpointError, match="has shape"):
            read.check(checkpoint, spec_of(param))
    with pytest.raises(CheckpointError, match=r"no tensor 'x\.1'"):
        read.tensor_of(checkpoint, Param("x", (1, 1), Source("x.{expert}"), experts=2), 1)
