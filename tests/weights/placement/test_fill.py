"""Filling memory on several threads: the same bytes as on one, the first error ends it, and nothing keeps running."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny_mixtures

from tightfit.errors import CheckpointError
from tightfit.model.spec import ModelSpec, Param, Source
from tightfit.weights.placement import fill, read
from tightfit.weights.placement.places import groups

MODELS = ("deepseek_v2", "gpt_oss", "mixtral", "qwen2_moe")
WEIGHTS = ("own", "int4", "fp8", "llm_int8(outliers=0.1)", "mixed(down=int8,ends=bf16,rest=int3(group=16))")


def bytes_of(checkpoint: Any, spec: ModelSpec, weights: str, threads: int) -> tuple[torch.Tensor, int]:
    """All groups one after the other, in memory that held something else, and how many bytes were told of."""
    layout = list(groups(checkpoint, spec, weights, dict.fromkeys(range(len(spec.layers)), weights)))
    memory = torch.zeros(sum(group.nbytes for group in layout), dtype=torch.uint8)
    parts, start = [], 0
    for group in layout:
        parts.append((group, memory[start : start + group.nbytes]))
        start += group.nbytes
    for group, data in parts:
        for place in group.places:
            place.of(data).fill_(0xA5)
    return memory, sum(fill.fill(checkpoint, parts, threads))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("family", MODELS)
def test_the_bytes_depend_neither_on_threads_nor_on_blocks(
    family: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, spec = tiny_mixtures.write(tmp_path, tiny_mixtures.config_of(family), torch.bfloat16)
    alone, told = bytes_of(checkpoint, spec, weights, 1)
    assert 0 < told <= len(alone)
    monkeypatch.setattr(read, "BLOCK_BYTES", 16 * 40 * 2)  # 16 rows of most matrices
    monkeypatch.setattr(read, "SLAB_BYTES", 300)
    again, _ = bytes_of(checkpoint, spec, weights, 6)
    assert torch.equal(alone, again)


def sums(work: Callable[[int], int], count: int = 3, units: int = 100) -> list[int]:
    return list(fill.in_parallel(range(1, units + 1), work, count))


def running() -> int:
    return threading.active_count()


def test_every_unit_is_worked_on_once_and_in_order() -> None:
    begun: list[int] = []
    assert sorted(sums(lambda unit: begun.append(unit) or unit, count=1)) == begun == list(range(1, 101))
    assert sorted(sums(lambda unit: unit, count=7)) == list(range(1, 101))


def test_units_are_worked_on_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=10)
    assert sums(lambda unit: meeting.wait() * 0 + unit, count=3, units=3)  # it breaks where they come one by one


@pytest.mark.parametrize("where", ["a unit", "the list of units"])
def test_the_first_error_is_raised_and_no_thread_is_left(where: str) -> None:
    before, begun = running(), []

    def units() -> Iterator[int]:
        yield from range(10)
        if where == "the list of units":
            raise CheckpointError("broken")
        yield from range(10, 100_000)

    def work(unit: int) -> int:
        begun.append(unit)
        time.sleep(0.001)
        if unit == 10:
            raise CheckpointError("broken")
        return unit

    with pytest.raises(CheckpointError, match="broken"):
        list(fill.in_parallel(units(), work, 4))
    assert running() == before
    assert len(begun) < 1000  # the others were not begun


def test_closing_ends_the_threads() -> None:
    before = running()
    results = fill.in_parallel(range(1_000_000), lambda unit: unit, 4)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert running() == before


@pytest.mark.parametrize("weights", ["int4", "fp8", "llm_int8"])
def test_a_weight_that_is_no_number_is_told_with_its_rows_and_tensor(weights: str, write: Any) -> None:
    block = torch.randn(200, 64)
    block[150, 3] = torch.inf
    checkpoint = write({"a.weight": block})
    spec = ModelSpec("x", 1, 1, (), (Param("lm_head", (200, 64), Source("a.weight")),), 1, 1e-6)
    with pytest.raises(CheckpointError, match=r"rows 0 to 199 of 'a.weight' of .*: a weight is not a finite number"):
        bytes_of(checkpoint, spec, weights, 2)
