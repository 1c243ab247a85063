"""The choice of a plan: the most precise weights that fit, sums that hold, and refusals that say what would do."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
from tests import gguf_files, random_model

from tightfit import child, zoo
from tightfit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.engine.start import workspace_bytes
from tightfit.errors import BudgetError
from tightfit.model.families import model_spec
from tightfit.plan.neighbours import neighbours
from tightfit.plan.schema import Numerics, Plan
from tightfit.plan.search import LEVELS, ByBytes, Search
from tightfit.plan.sensitivity import Sensitivity, prior
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
    worst = 0.0
    for tenths in range(2400, 2100, -30):
        budget = tenths * MIB // 10
        try:
            plan = search(nano, budget=budget).best(RUNTIME)
        except BudgetError:
            break
        assert plan.total <= budget
        lost = search(nano).nats(plan)
        assert lost >= worst * 0.95  # divergence never falls as memory shrinks, but for what counts as equal
        worst = lost
        seen |= {precision[name] for name in formats(plan)}
    else:
        pytest.fail("nothing was refused")
    assert seen >= {0, 1, 2}


def test_room_between_two_formats_is_spent_where_it_gains_most(nano: Checkpoint) -> None:
    small = search(nano).uniform("int4", 512, RUNTIME)
    large = search(nano).uniform("int5", 512, RUNTIME)
    plan = search(nano, budget=(small.total + 3 * large.total) // 4, chunk=512).best(RUNTIME)
    precision = {level: place for place, level in enumerate(LEVELS)}
    bits = [precision[layer.format] for layer in plan.layers]
    assert len(set(bits)) > 1
    assert bits[0] == min(bits)  # the first layer loses most, by what is assumed as by what is measured
    assert search(nano).nats(plan) < search(nano).nats(small)


@pytest.mark.parametrize("level", ["int8", "int5", "int4"])
def test_no_uniform_format_loses_less_in_the_same_memory(nano: Checkpoint, level: str) -> None:
    uniform = search(nano).uniform(level, 512, RUNTIME)
    plan = search(nano, budget=uniform.total).best(RUNTIME)
    assert search(nano).nats(plan) <= search(nano).nats(uniform) * 1.001
    assert plan.total <= uniform.total


def test_what_fits_as_it_is_needs_no_solver(nano: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "ask", lambda *arguments: pytest.fail("a solver was started"))
    assert set(formats(search(nano, budget=1024 * MIB).best(RUNTIME))) == {"own"}
    assert set(formats(search(nano, budget=1024 * MIB, weights="int4", prefer="speed").best(RUNTIME))) == {"int4"}


def test_measured_sensitivities_decide_which_layers_get_more_bits(nano: Checkpoint) -> None:
    layers = 8
    assumed = prior(layers)
    tough = {group: dict.fromkeys(losses, 1e-6) for group, losses in assumed.weights.items()}
    tough["layers.5"] = {fmt: 100 * nats for fmt, nats in assumed.weights["layers.5"].items()}
    measured = Sensitivity(tough, {}, measured=True)
    budget = search(nano).uniform("int5", 512, RUNTIME).total
    plan = search(nano, budget=budget, chunk=512)
    plan.sensitivity = measured
    found = plan.best(RUNTIME)
    assert found.layers[5].format == "own"
    assert {layer.format for index, layer in enumerate(found.layers) if index != 5} != {"own"}


class Machine(ByBytes):
    """A machine on which int4 is fast, and everything else is slow."""

    def decode_seconds(self, group: str, fmt: str) -> float:
        return 0.001 if fmt == "int4" else 0.01

    def prefill_seconds(self, group: str, fmt: str, chunk: int) -> float:
        return 0.001


def test_preferences_trade_divergence_for_time(nano: Checkpoint) -> None:
    found = {}
    for prefer in ("quality", "balanced", "speed"):
        wanted = search(nano, budget=1024 * MIB, prefer=prefer)
        wanted.times = Machine(wanted)
        found[prefer] = wanted.best(RUNTIME)
        assert found[prefer].total <= 1024 * MIB
    assert set(formats(found["quality"])) == {"own"}
    assert set(formats(found["speed"])) == {"int4"}  # 0.036 nats: less than 0.1
    lost = {prefer: search(nano).nats(plan) for prefer, plan in found.items()}
    assert lost["quality"] <= lost["balanced"] <= lost["speed"] <= 0.1


def test_the_cache_is_chosen_where_it_is_left_open_and_only_there(nano: Checkpoint) -> None:
    large = {"context": 4096, "sequences": 4}
    assert search(nano, budget=1024 * MIB, **large, kv=None).best(RUNTIME).cache == "none"
    budget = search(nano, **large).smallest(RUNTIME).total - 2 * MIB
    with pytest.raises(BudgetError):
        search(nano, budget=budget, **large).best(RUNTIME)
    plan = search(nano, budget=budget, **large, kv=None).best(RUNTIME)
    assert plan.cache != "none"
    assert plan.total <= budget
    limit = 32 * MIB
    assert search(nano, budget=1024 * MIB, **large, kv=None, kv_bytes=limit).best(RUNTIME).accounts["kv"] <= limit


def test_a_cache_of_which_nothing_is_known_does_not_decide_what_is_rounded(nano: Checkpoint) -> None:
    budget = search(nano, weights="int6", kv="quest(tokens=256)").smallest(RUNTIME).total
    plan = search(nano, budget=budget, kv="quest(tokens=256)").best(RUNTIME)
    assert plan.cache == "quest(tokens=256)"
    assert 0 < search(nano).nats(plan) < search(nano).nats(search(nano, weights="int5").smallest(RUNTIME))
    assert search(nano).sensitivity.of_plan(plan) is None


def test_neighbours_are_on_the_other_sides_and_say_what_they_cost(nano: Checkpoint) -> None:
    wanted = search(nano, budget=search(nano).uniform("int5", 512, RUNTIME).total)
    plan = wanted.best(RUNTIME)
    found = {each.better: each for each in neighbours(wanted, plan)}
    assert found["smaller"].plan.total < plan.total
    assert found["smaller"].nats > wanted.nats(plan)
    assert "nats more" in found["smaller"].why
    assert found["faster"].seconds < wanted.seconds(plan)
    precise = next(each for name, each in found.items() if name.startswith("more precise"))
    assert precise.nats <= wanted.nats(plan) / 2
    assert "slower" in precise.why or "needs" in precise.why


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


def test_a_refusal_says_which_account_is_short_and_by_how_much(nano: Checkpoint) -> None:
    plan = search(nano).smallest(RUNTIME)
    budget = plan.total - MIB
    with pytest.raises(BudgetError) as refused:
        search(nano, budget=budget).best(RUNTIME)
    assert refused.value.smallest_bytes == plan.total
    assert "The weights account is 1 MiB short" in refused.value.hint
    with pytest.raises(BudgetError, match="The runtime account is 100 MiB short"):
        search(nano, budget=RUNTIME - 100 * MIB).best(RUNTIME)


def test_every_way_out_that_a_refusal_names_fits(nano: Checkpoint) -> None:
    constraints = {"context": 4096, "sequences": 4, "weights": "int8"}
    budget = search(nano, **constraints).smallest(RUNTIME).total - 3 * MIB
    with pytest.raises(BudgetError) as refused:
        search(nano, budget=budget, **constraints).best(RUNTIME)
    hint = refused.value.hint
    ways = {
        "leave out --weights": {"weights": None},
        "--weights int4": {"weights": "int4"},
        "--kv int8": {"kv": "int8"},
        "--context 2048": {"context": 2048},
        "--batch 2": {"sequences": 2},
    }
    for way, changes in ways.items():
        assert f"or {way} (" in hint, way
        assert search(nano, budget=budget, **constraints | changes).best(RUNTIME).total <= budget


@pytest.mark.parametrize(("weights", "advised"), [(None, False), ("int4", True)])
def test_what_cannot_stream_before_it_is_compressed_is_advised_to_be(
    weights: str | None, advised: bool, tmp_path: Path
) -> None:
    settings = random_model.config(**random_model.PRESETS["wide"])
    checkpoint = open_checkpoint(str(random_model.write_headers(tmp_path / "wide", settings)))
    budget = search(checkpoint, weights="own").smallest(RUNTIME).total - MIB
    with pytest.raises(BudgetError) as refused:
        search(checkpoint, weights=weights, budget=budget).best(RUNTIME)
    assert ("`tightfit compress MODEL --weights int4 --out FOLDER`" in refused.value.hint) == advised


def test_quantised_files_are_advised_to_be_compressed_where_that_fits(tmp_path: Path) -> None:
    """Their types are converted when they are read, so that they cannot stream."""
    checkpoint = open_checkpoint(str(gguf_files.large(tmp_path / "model.gguf", "Q4_K", 512, 2048, 8)))
    budget = search(checkpoint, context=256).smallest(RUNTIME).total - MIB
    with pytest.raises(BudgetError) as refused:
        search(checkpoint, context=256, budget=budget).best(RUNTIME)
    assert "`tightfit compress MODEL --out FOLDER`" in refused.value.hint


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
