"""A GGUF file runs inside its budget, as measured from outside of the process, and no larger one is asked for."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from tests import gguf_files
from tests.measure import run_measured
from tests.memory.test_budget import BUDGETERROR, MIB, check, command, generate, smallest_bytes
from tests.memory.test_loading import LOAD


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


@pytest.mark.parametrize(
    ("weights", "kernels", "at_least"), [("own", "", 0.3), ("int4", "", 0.15), ("own", "reference", 0.2)]
)
def test_loading_takes_what_is_said(model: Path, weights: str, kernels: str, at_least: float) -> None:
    """Codes are moved a block at a time, and decoded where another format is asked for."""
    environment = os.environ | ({"TIGHTFIT_CPU": kernels} if kernels else {})
    done = run_measured([sys.executable, "-c", LOAD, str(model), weights, "2"], env=environment)
    assert done.exit_code == 0, done.stderr
    numbers = json.loads(done.stdout)
    taken = done.peak_bytes - numbers["before"] - numbers["weights"]
    assert at_least * numbers["said"] <= taken <= numbers["said"]


def test_a_compressed_file_streams_with_the_same_tokens(model: Path, tmp_path: Path) -> None:
    """In less memory than the file needs, whose codes have to be rearranged."""
    out = tmp_path / "out"
    assert run_measured(command("compress", model, "--out", out, "--memory", "400MiB")).exit_code == 0
    needed, smallest = smallest_bytes(model, "--chunk", 16), smallest_bytes(out, "--chunk", 16)
    assert smallest < needed - 20 * MIB
    runs = [
        run_measured(generate(path, 40, 12, "--memory", f"{budget // 1024}KiB", "--chunk", 16))
        for path, budget in ((model, 400 * MIB), (out, smallest))
    ]
    plan = check(runs[1], smallest)["plan"]
    assert {layer["placement"] for layer in plan["layers"]} == {"streamed"}
    texts = [json.loads(run.stdout)["completions"][0]["text"] for run in runs]
    assert texts[0] == texts[1]
