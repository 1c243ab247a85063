"""A step that decodes repeats the operations of the one before, with the bits of a step that is computed anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.harness import ROOM, Ours, make, save, tokens_of
from tests.parity.test_batch_invariance import CHUNK, LENGTH, MODELS

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import cpu, ops
from tightfit.model.batch import Segment
from tightfit.model.decoder import Decoder

FORMATS = ["f32", "bf16", "int8", "int4(group=16,symmetric=false)", "fp8", "ternary", "llm_int8"]
FORMATS += ["pruned", "mixed(ends=int8,mlp=pruned)"]
PREFILLS, ANEW = [CHUNK, CHUNK], [*[1] * 6, *[2] * 6, *[1] * 6]

pytestmark = pytest.mark.skipif(not cpu.available(), reason="only compiled kernels are repeated")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches whose layers were computed and not repeated."""
    sizes: list[int] = []
    compute = Decoder._compute_layers

    def noted(self: Decoder, x: torch.Tensor, *rest: Any) -> None:
        if not ops.is_dry():
            sizes.append(len(x))
        compute(self, x, *rest)

    monkeypatch.setattr(Decoder, "_compute_layers", noted)
    return sizes


def decoded(folder: Path, weights: str, anew: bool) -> list[torch.Tensor]:
    """The logits of one sequence, of a second one beside it from its seventh step on, and of that one alone."""
    ours = Ours(folder, context=LENGTH, chunk=CHUNK, sequences=2, weights=weights)
    rows = [tokens_of(make(MODELS["head norms"]), LENGTH, seed) for seed in range(2)]
    ws = Workspace(Arena(ROOM))
    for slot, row in enumerate(rows):
        ours.step(Segment(slot, 0, row[:CHUNK], logits="all"), ws=ws)
    answers = []
    for step in range(18):
        starts = {slot: CHUNK + step - 6 * slot for slot in range(2) if 6 * slot <= step < 12 + 6 * slot}
        news = [Segment(slot, at, rows[slot][at : at + 1], decode=True) for slot, at in starts.items()]
        answers += ours.step(*news, ws=None if anew else ws)
    return answers


def check(folder: Path, weights: str, computed: list[int], expected: list[int]) -> None:
    repeated = decoded(folder, weights, anew=False)
    assert computed == expected
    computed.clear()
    anew = decoded(folder, weights, anew=True)
    assert computed == PREFILLS + ANEW
    for a, b in zip(repeated, anew, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weights", FORMATS)
def test_formats(weights: str, tmp_path: Path, computed: list[int]) -> None:
    check(save(make(MODELS["head norms"]), tmp_path), weights, computed, [*PREFILLS, 1, 2, 1])


@pytest.mark.parametrize("name", ["dynamic rope and biases", "soft caps and windows"])
def test_architectures(name: str, tmp_path: Path, computed: list[int]) -> None:
    check(save(make(MODELS[name]), tmp_path), "f32", computed, [*PREFILLS, 1, 2, 1])


def test_what_a_router_chooses_is_computed_in_each_step(tmp_path: Path, computed: list[int]) -> None:
    check(save(make(MODELS["experts"]), tmp_path), "f32", computed, PREFILLS + ANEW)
