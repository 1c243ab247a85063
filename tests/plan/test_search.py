"""The choice of a plan: the most precise weights that fit, sums that hold, and refusals that say what would do."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tests import random_model, tiny_mixtures

from tightfit import zoo
from tightfit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.engine.start import workspace_bytes
from tightfit.errors import BudgetError
from tightfit.model.families import model_spec
from tightfit.plan.schema import Numerics, Plan
from tightfit.plan.search import LEVELS, Search
from tightfit.plan.sizes import Constraints
from tightfit.weights.placement.places import group_of, layer_name
from tightfit.weights.placement.streamed import cut_at

MIB = 1 << 20
RUNTIME = 200 * MIB
CONSTRAINTS = Constraints(
    budget=0, context=1024, sequences=1, threads=2, numerics=Numerics(gemm="bfloat16", kv="bfloat16")
)


@pytest.fixture(scope="module")
def nano() -> Checkpoint:
    return open_checkpoint(str(zoo.path("nano")))


def search(checkpoint: Checkpoint, **changes: object) -> Search:
    spec = model_spec(Config(checkpoint.config, checkpoint.name), checkpoint.tensors)
    constraints = dataclasses.replace(CONSTRAINTS, **changes)  # type: ignore[arg-type]
    return Search(checkpoint, spec, constraints, lambda plan: workspace_bytes(checkpoint, spec, plan))


def formats(plan: Plan) -> list[str]:
    return [plan.outer.format, *(layer.format for layer in plan.layers)]


def test_plenty_of_memory_keeps_the_weights_as_they_are(nano: Checkpoint) -> None:
    plan = search(nano, budget=1024 * MIB).best(RUNTIME)
    assert set(formats(plan)) == {"own"}
    assert plan.chunk == 512
    # 7.08 million numbers of two bytes, and norms that are kept in four
    assert 2 * 7_082_240 <= plan.accounts["weights"] <= 2 * 7_082_240 + 64 * 1024
    # 8 layers of keys and values of 2 heads of 64 features in two bytes, for 1024 tokens
    assert plan.accounts["kv"] == pytest.approx(8 * 2 * 2 * 64 * 2 * 1024, rel=0.01)


def test_less_memory_takes_fewer_bits_and_the_sum_always_fits(nano: Checkpoint) -> None:
    seen, precision = set(), {level: place for place, level in enumerate(LEVELS)}
    worst = 0
    for tenths in range(2400, 2100, -5):
        budget = tenths * MIB // 10
        try:
            plan = search(nano, budget=budget).best(RUNTIME)
        except BudgetError:
            break
        assert plan.total <= budget
        level = max(precision[name] for name in formats(plan))
        assert level >= worst  # precision never rises as memory shrinks
        worst = level
        seen.add(level)
    else:
        pytest.fail("nothing was refused")
    assert seen >= {0, 1, 2}


def test_room_between_two_formats_is_spent_on_some_layers(nano: Checkpoint) -> None:
    small = search(nano).uniform("int4", 512, RUNTIME)
    large = search(nano).uniform("int5", 512, RUNTIME)
    plan = search(nano, budget=(small.total + 3 * large.total) // 4, chunk=512).best(RUNTIME)
    assert plan.outer.format == "int5"
    assert plan.layers[0].format == "int5"
    assert {layer.format for layer in plan.layers} == {"int4", "int5"}
    assert plan.layers[len(plan.layers) // 2].format == "int4"  # the middle loses least


def test_the_smallest_plan_works_and_one_byte_less_is_refused_with_its_number(nano: Checkpoint) -> None:
    smallest = search(nano).smallest(RUNTIME).total
    assert search(nano, budget=smallest).best(RUNTIME).total == smallest
    with pytest.raises(BudgetError) as refused:
        search(nano, budget=smallest - 1).best(RUNTIME)
    assert refused.value.smallest_bytes == smallest


def test_what_streams_uses_any_budget_up_and_keeps_of_the_head_what_it_keeps_of_the_layers(tmp_path: Path) -> None:
    settings = random_model.config(**random_model.PRESETS["wide"])
    checkpoint = open_checkpoint(str(random_model.write_headers(tmp_path / "wide", settings)))
    smallest = search(checkpoint, weights="own").smallest(RUNTIME)
    assert (smallest.outer.placement, smallest.outer.resident) == ("streamed", 0)
    vocab = random_model.PRESETS["wide"]["vocab"]
    spec = model_spec(Config(checkpoint.config, "wide"), checkpoint.tensors)
    group = group_of(checkpoint, spec, layer_name(0), "own")  # all layers are alike
    rows = []
    for more in range(0, 160 * MIB, 5 * MIB // 2):
        plan = search(checkpoint, weights="own", budget=smallest.total + more).best(RUNTIME)
        assert Plan.model_validate_json(plan.model_dump_json()) == plan
        if plan.outer.resident is None:
            break
        assert plan.total > plan.budget - MIB // 2
        rows.append(plan.outer.resident)
        kept = sum(cut_at(group, layer.resident or 0)[0] for layer in plan.layers) / (len(plan.layers) * group.nbytes)
        # The head has what is too little for the next of a layer's matrices.
        assert rows[-1] / vocab == pytest.approx(kept, abs=0.1)
    assert len(rows) > 30
    assert all(after > before - vocab // 20 for before, after in pairwise(rows))


@pytest.mark.parametrize(
    ("model", "weights", "advised"),
    [("nano", None, False), ("nano", "int4", True), ("mixtral", None, False), ("gpt_oss", None, True)],
)
def test_what_cannot_stream_before_it_is_compressed_is_advised_to_be(
    model: str, weights: str | None, advised: bool, nano: Checkpoint, tmp_path: Path
) -> None:
    """Experts of gpt-oss are stored transposed."""
    checkpoint = nano
    if model != "nano":
        checkpoint, _ = tiny_mixtures.write(tmp_path, tiny_mixtures.config_of(model), torch.bfloat16)
    with pytest.raises(BudgetError) as refused:
        search(checkpoint, weights=weights, context=64).best(RUNTIME)
    assert ("`tightfit compress MODEL --weights int4 --out FOLDER`" in refused.value.hint) == advised


def test_named_weights_are_kept_to(nano: Checkpoint) -> None:
    assert set(formats(search(nano, budget=1024 * MIB, weights="int4(group=64)").best(RUNTIME))) == {"int4(group=64)"}
    with pytest.raises(BudgetError, match="does not fit"):
        search(nano, budget=RUNTIME + 8 * MIB, weights="bf16").best(RUNTIME)


def test_a_plan_survives_being_written_and_read(nano: Checkpoint) -> None:
    plan = search(nano, budget=1024 * MIB).best(RUNTIME)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_bytes_of_a_real_size_are_those_of_its_headers(tmp_path: Path) -> None:
    """Headers alone: the numbers are a hole in the file."""
    settings = random_model.config(**random_model.PRESETS["3b"])
    folder = random_model.write_headers(tmp_path / "3b", settings)
    plan = search(open_checkpoint(str(folder)), budget=64 << 30).best(RUNTIME)
    assert plan.accounts["weights"] == pytest.approx(2 * plan.model.parameters, rel=0.001)
    four = search(open_checkpoint(str(folder))).uniform("int4", 512, RUNTIME)
    assert four.accounts["weights"] == pytest.approx(4.5 / 8 * plan.model.parameters, rel=0.002)
