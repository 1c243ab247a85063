"""What rounding costs, measured on the embedded model, and the plans that are chosen by it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.engine.opening import Opened, Wish, open_model
from tightfit.engine.sensitivity import calibration_text, divergences, measure_sensitivity
from tightfit.engine.start import Shape, build, workspace_bytes
from tightfit.errors import BudgetError, UsageError
from tightfit.model.batch import Batch, Segment
from tightfit.plan.schema import Numerics, Plan
from tightfit.plan.search import Search
from tightfit.plan.sensitivity import Sensitivity, read_sensitivity
from tightfit.plan.sizes import Constraints

MIB = 1 << 20
FORMATS = ("int8", "int6", "int4")
ROW, ROWS = 128, 4
RUNTIME = 200 * MIB


@pytest.fixture(scope="module")
def opened() -> Opened:
    return open_model(Wish("nano", "2GiB"))


@pytest.fixture(scope="module")
def measured(opened: Opened, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Sensitivity]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIGHTFIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        wish = Wish("nano", "2GiB")
        answer = measure_sensitivity(wish, opened, calibration_text(), FORMATS, tokens=256)
        return answer, read_sensitivity(opened.checkpoint.fingerprint, 8)


def test_divergences_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    exact, others = torch.randn(5, 100), torch.randn(3, 5, 100)
    others[0] = exact + 7.0  # the same probabilities
    others[1] = exact + 1e-3 * others[1]
    p = exact.double().log_softmax(-1)
    expected = (p.exp() * (p - others.double().log_softmax(-1))).sum(-1)
    found = divergences(exact.clone(), others.clone(), torch.empty(5, 100))
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-8)
    assert (found[1] > 0).all()  # a millionth of a nat is not lost


def test_every_group_loses_and_more_in_fewer_bits(measured: tuple[dict[str, Any], Sensitivity]) -> None:
    answer, found = measured
    assert found.measured
    assert (answer["tokens"], len(answer["weights"])) == (256, 9)
    for losses in answer["weights"].values():
        assert 0 < losses["int8"] < losses["int6"] < losses["int4"]
    cache = answer["cache"]
    assert 0 <= cache["int8"] < cache["int4"] < cache["snapkv(keep=128)+int4"]


def test_measuring_in_several_passes_gives_the_same(
    opened: Opened, measured: tuple[dict[str, Any], Sensitivity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    monkeypatch.setattr("tightfit.engine.sensitivity.SHARE", 1 << 30)  # as little memory as can be
    monkeypatch.setattr("tightfit.engine.sensitivity._measure_caches", lambda *arguments: {})
    passes: list[tuple[int, int]] = []
    answer = measure_sensitivity(
        Wish("nano", "2GiB"),
        opened,
        calibration_text(),
        ("int4",),
        256,
        lambda done, total: passes.append((done, total)),
    )
    assert passes[-1][0] == passes[-1][1] > 9  # more than the layers and the head once
    for group, losses in answer["weights"].items():
        assert losses["int4"] == pytest.approx(measured[0]["weights"][group]["int4"], rel=1e-3)


def test_what_cannot_be_measured_is_refused(opened: Opened) -> None:
    with pytest.raises(UsageError, match="the text has"):
        measure_sensitivity(Wish("nano"), opened, "short")
    with pytest.raises(BudgetError) as refused:
        measure_sensitivity(Wish("nano"), dataclasses.replace(opened, budget=64 * MIB), calibration_text())
    assert refused.value.smallest_bytes is not None


@torch.inference_mode()
def logits(checkpoint: Checkpoint, opened: Opened, plan: Plan, rows: list[list[int]]) -> torch.Tensor:
    """(tokens, vocab) of a plan's weights, computed as prompts are."""
    arenas = [Arena(1 << 30) for _ in range(3)]
    placement, decoder, cache = build(checkpoint, opened.spec, range(8), Shape.of(plan), arenas[0], arenas[1])
    placement.load()
    ws, found = Workspace(arenas[2]), []
    for row in rows:
        cache.begin(0, 0)
        with ws.frame():
            hidden = decoder.hidden(Batch((Segment(0, 0, row, logits="all"),)), cache, ws)
            found.append(decoder.logits(hidden, ws).clone())
    return torch.cat(found)


@torch.inference_mode()
def test_the_chosen_plan_loses_no_more_than_a_uniform_format_in_its_memory(
    opened: Opened, measured: tuple[dict[str, Any], Sensitivity]
) -> None:
    """Measured on other text than the sensitivities."""
    checkpoint, spec = opened.checkpoint, opened.spec
    tokens = checkpoint.tokenizer().encode(calibration_text()[-8192:])
    rows = [tokens[start : start + ROW] for start in range(0, ROWS * ROW, ROW)]
    numerics = Numerics(gemm="float32", kv="float32", activations="float32")

    def search(budget: int) -> Search:
        constraints = Constraints(budget, 512, 1, 2, numerics, chunk=ROW)
        return Search(checkpoint, spec, constraints, lambda plan: workspace_bytes(checkpoint, spec, plan), measured[1])

    exact = logits(checkpoint, opened, search(1 << 40).best(RUNTIME), rows)

    def lost(plan: Plan) -> float:
        other = logits(checkpoint, opened, plan, rows)[None]
        return float(divergences(exact.clone(), other, torch.empty_like(exact)).mean())

    for level in ("int6", "int4"):
        uniform = search(1 << 40).uniform(level, ROW, RUNTIME)
        chosen = search(uniform.total).best(RUNTIME)
        assert chosen.total <= uniform.total
        assert lost(chosen) <= lost(uniform), level
