"""A GGUF file runs inside its budget, as measured from outside of the process, and no larger one is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import gguf_files
from tests.measure import run_measured
from tests.memory.test_budget import BUDGETERROR, MIB, check, generate, smallest_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.large(tmp_path_factory.mktemp("gguf") / "model.gguf", "Q4_K")


def test_a_run_stays_inside_its_budget(model: Path) -> None:
    smallest = smallest_bytes(model)
    for budget in (smallest, 400 * MIB):
        receipt = check(run_measured(generate(model, 600, 4, "--memory", f"{budget // 1024}KiB")), budget, 0.75)
    assert {layer["format"] for layer in receipt["plan"]["layers"]} == {"own"}
    refused = run_measured(generate(model, 600, 4, "--memory", f"{smallest // 1024 - 12 * 1024}KiB"))
    assert refused.exit_code == BUDGETERROR
