"""Loading takes no more beside the weights than the plan keeps free for it, and not much less, as measured from outside
of the process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from tests import random_model
from tests.measure import run_measured

LOAD = """
import json, sys
from tightfit.budget.malloc import tune_malloc
tune_malloc()
import torch
from tightfit.budget.ledger import Arena
from tightfit.budget.meter import resident_set
from tightfit.checkpoints.checkpoint import open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.kernels import cpu
from tightfit.model.families import model_spec
from tightfit.weights.placement.fill import scratch_bytes
from tightfit.weights.placement.places import groups
from tightfit.weights.placement.resident import Resident
folder, weights, threads = sys.argv[1:]
torch.set_num_threads(1)
cpu.set_threads(int(threads))
checkpoint = open_checkpoint(folder)
spec = model_spec(Config(checkpoint.config, checkpoint.name), checkpoint.tensors)
formats = dict.fromkeys(range(len(spec.layers)), weights)
resident = Resident(checkpoint, spec, weights, formats, torch.bfloat16, Arena(1 << 30))
said = max(scratch_bytes(checkpoint, group, cpu.threads()) for group in groups(checkpoint, spec, weights, formats))
before = resident_set()
assert before.peak - before.current < 8 << 20  # what was imported would hide what loading takes
resident.load()
print(json.dumps({"before": before.current, "weights": resident.nbytes, "said": said}))
"""


def write(folder: Path, ffn: int) -> Path:
    """A llama whose numbers are a hole in the file."""
    settings = random_model.config(hidden=2048, layers=1, heads=32, kv_heads=4, ffn=ffn, vocab=4000)
    return random_model.write_headers(folder, settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "model", ffn=5632)


# fp8 and llm_int8 go through a matrix twice, which not all threads do at the same time: less is taken than may be.
@pytest.mark.parametrize(
    ("weights", "threads", "at_least"),
    [
        ("own", 2, 0.05),
        ("f16", 2, 0.3),
        ("int4", 1, 0.3),
        ("int4", 2, 0.3),
        ("int4", 8, 0.3),
        ("int4(group=0)", 2, 0.3),
        ("pruned", 2, 0.3),
        ("fp8", 2, 0.1),
        ("llm_int8", 2, 0.2),
    ],
)
def test_loading_takes_what_is_said(folder: Path, weights: str, threads: int, at_least: float) -> None:
    done = run_measured([sys.executable, "-c", LOAD, str(folder), weights, str(threads)])
    assert done.exit_code == 0, done.stderr
    numbers = json.loads(done.stdout)
    taken = done.peak_bytes - numbers["before"] - numbers["weights"]
    assert at_least * numbers["said"] <= taken <= numbers["said"]


@pytest.mark.parametrize("weights", ["int4", "pruned"])
def test_the_torch_reference_takes_what_is_said(tmp_path: Path, weights: str) -> None:
    folder, environment = write(tmp_path / "model", ffn=1024), os.environ | {"TIGHTFIT_CPU": "reference"}
    done = run_measured([sys.executable, "-c", LOAD, str(folder), weights, "2"], env=environment, timeout=300)
    assert done.exit_code == 0, done.stderr
    numbers = json.loads(done.stdout)
    taken = done.peak_bytes - numbers["before"] - numbers["weights"]
    assert 0.3 * numbers["said"] <= taken <= numbers["said"]
