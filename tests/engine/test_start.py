"""Starting: the dry run knows the scratch of every step, and a rehearsal takes no weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import random_model

from tightfit.budget.ledger import Arena, Workspace
from tightfit.budget.meter import resident_set
from tightfit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.engine import start
from tightfit.errors import CheckpointError
from tightfit.kernels import ops
from tightfit.model.batch import Batch, Segment
from tightfit.model.families import model_spec
from tightfit.model.spec import ModelSpec
from tightfit.plan.schema import Numerics, Plan
from tightfit.plan.search import Search
from tightfit.plan.sizes import Constraints

MIB = 1 << 20


@pytest.fixture(scope="module")
def billion(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, ModelSpec]:
    """The headers of a llama of a billion parameters; its numbers are a hole in the file."""
    settings = random_model.config(**random_model.PRESETS["1b"])
    checkpoint = open_checkpoint(str(random_model.write_headers(tmp_path_factory.mktemp("1b"), settings)))
    return checkpoint, model_spec(Config(checkpoint.config, checkpoint.name), checkpoint.tensors)


def plan_of(checkpoint: Checkpoint, spec: ModelSpec, level: str, chunk: int, sequences: int = 1) -> Plan:
    constraints = Constraints(16 << 30, 2048, sequences, threads=2, numerics=Numerics(gemm="bfloat16", kv="bfloat16"))
    search = Search(checkpoint, spec, constraints, lambda plan: start.workspace_bytes(checkpoint, spec, plan))
    return search.uniform(level, chunk, runtime=0)


def dry(checkpoint: Checkpoint, spec: ModelSpec, plan: Plan, batch: Batch) -> int:
    """Scratch of one step, logits of at most 16 rows included."""
    shape = start.Shape.of(plan)
    layers = start.different_layers(checkpoint, spec, shape.formats)
    arenas = [Arena(start.VIRTUAL) for _ in range(3)]
    _, decoder, cache = start.build(checkpoint, spec, layers, shape, arenas[0], arenas[1])
    ws = Workspace(arenas[2])
    with torch.inference_mode(), ops.dry(), ws.frame():
        decoder.hidden(batch, cache, ws)
    return ws.high_water


@pytest.mark.parametrize("level", ["own", "int4"])
def test_no_step_takes_more_scratch_than_the_planned_one(billion: tuple[Checkpoint, ModelSpec], level: str) -> None:
    checkpoint, spec = billion
    plan = plan_of(checkpoint, spec, level, chunk=256, sequences=3)
    planned = start.workspace_bytes(checkpoint, spec, plan)
    tokens = [0] * 256
    steps = {
        "the logits of a whole chunk": [Segment(0, 0, tokens, logits="all")],
        "the last chunk of the context": [Segment(0, 1792, tokens)],
        "the middle of the context": [Segment(0, 1000, tokens)],
        "prompts that are padded to one chunk": [Segment(slot, 0, tokens[:n]) for slot, n in enumerate((65, 33, 33))],
        "everybody decodes": [Segment(slot, 2047, [0], decode=True) for slot in range(3)],
        "one prompt beside two that decode": [
            Segment(0, 2047, [0], decode=True),
            Segment(1, 700, [0], decode=True),
            Segment(2, 1024, tokens),
        ],
    }
    for name, segments in steps.items():
        assert dry(checkpoint, spec, plan, Batch.of(segments)) <= planned, name


def test_the_workspace_is_not_larger_than_the_largest_step_needs(billion: tuple[Checkpoint, ModelSpec]) -> None:
    checkpoint, spec = billion
    plan = plan_of(checkpoint, spec, "own", chunk=256)
    needed = dry(checkpoint, spec, plan, Batch((Segment(0, 1792, [0] * 256),)))
    assert start.workspace_bytes(checkpoint, spec, plan) <= needed + MIB  # and the logits of one token, 75 KiB


def test_a_rehearsal_reads_no_weights_and_leaves_nothing_behind(billion: tuple[Checkpoint, ModelSpec]) -> None:
    checkpoint, spec = billion
    plan = plan_of(checkpoint, spec, "own", chunk=64)
    start.rehearse(checkpoint, spec, plan)  # once, so that libraries are warm
    before = resident_set().current
    runtime = start.rehearse(checkpoint, spec, plan)
    assert abs(runtime - before) < 40 * MIB  # two gigabytes of weights are nowhere
    assert resident_set().current - before < 8 * MIB


def test_layers_of_one_kind_are_rehearsed_once(billion: tuple[Checkpoint, ModelSpec]) -> None:
    checkpoint, spec = billion
    assert start.different_layers(checkpoint, spec, ("int8",) * 2 + ("int4",) * 20) == [0, 2]


def test_a_missing_tensor_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
    settings = random_model.config(**random_model.PRESETS["1b"]) | {"num_hidden_layers": 2}
    folder = random_model.write_headers(tmp_path / "model", settings)
    text = (folder / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    (folder / "config.json").write_text(text)
    checkpoint = open_checkpoint(str(folder))
    spec = model_spec(Config(checkpoint.config, checkpoint.name), checkpoint.tensors)
    constraints = Constraints(16 << 30, 128, 1, threads=2, numerics=Numerics(gemm="bfloat16", kv="bfloat16"))
    with pytest.raises(CheckpointError, match=r"layers\.2"):
        start.settle(checkpoint, spec, constraints)
