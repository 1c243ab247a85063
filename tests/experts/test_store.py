"""Experts that come from the disk give the bits of those in memory, in every family, format and cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_mixtures import CONFIGS, config_of, write

from tightfit.budget.ledger import Arena, Workspace
from tightfit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from tightfit.engine import start
from tightfit.errors import UsageError
from tightfit.experts.census import Census, write_census
from tightfit.experts.store import LEAST_SLOTS, CachedExperts, expert_count
from tightfit.model.batch import Batch, Segment
from tightfit.model.spec import ModelSpec
from tightfit.plan.schema import Numerics, Plan
from tightfit.plan.search import Search
from tightfit.plan.sizes import Constraints, Layout
from tightfit.weights import store
from tightfit.weights.placement.base import EXPERT_OBJECTS
from tightfit.weights.placement.streamed import Kept

CONTEXT, CHUNK = 64, 32
# Experts of these are stored transposed, and must be converted while they are read.
CONVERTED = {"gpt_oss"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Model:
    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        self.checkpoint, self.spec = checkpoint, spec
        weights = checkpoint.compressed.weights if checkpoint.compressed else "own"
        numerics = Numerics(gemm="float32", kv="float32", activations="float32")
        constraints = Constraints(1 << 30, CONTEXT, 2, 1, numerics, weights=weights, chunk=CHUNK)
        self.search = Search(checkpoint, spec, constraints, lambda plan: 1 << 20)
        self.formats = [weights] * len(spec.layers)

    def resident(self) -> Plan:
        return self.search.uniform(self.formats[0], CHUNK, 0)

    def cached(self, slots: int, policy: str = "lru+gate", others: str = "all") -> Plan:
        """A plan with so many experts in memory, and of what else there is ``all`` or the ``least``."""
        groups, experts = self.search.apart(self.formats)
        assert any(experts)
        outer = self.search.outer(self.formats[0])
        kept = Kept(tuple(len(group.places) for group in groups), outer.rows)
        if others == "least":
            kept = Kept(tuple(self.search.least_resident(group) for group in groups), outer.least)
        plan = self.search.plan(Layout(self.formats[0], tuple(self.formats), "none", CHUNK), 0, kept, 2, slots)
        assert plan.experts is not None
        return plan.model_copy(update={"experts": plan.experts.model_copy(update={"policy": policy})})

    def steps(self, plan: Plan) -> tuple[list[torch.Tensor], Any]:
        """The logits of a prompt, of steps that decode two sequences, and of another prompt; and the placement."""
        arenas = Arena(plan.accounts["weights"]), Arena(plan.accounts["kv"])
        slots = Arena(plan.accounts["experts"]) if plan.experts else None
        shape = start.Shape.of(plan)
        layers = range(len(self.spec.layers))
        placement, decoder, cache = start.build(self.checkpoint, self.spec, layers, shape, *arenas, plan, slots)
        placement.load()
        ws, logits = Workspace(Arena(1 << 28)), []
        for batch in batches():
            with ws.frame(), torch.inference_mode():
                logits.append(decoder.logits(decoder.hidden(batch, cache, ws), ws).clone())
        placement.close()
        return logits, placement


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def batches() -> list[Batch]:
    prompts = [Segment(0, 0, tokens(CHUNK, 1)), Segment(1, 0, tokens(7, 2))]
    starts = {0: CHUNK, 1: 7}
    steps = [
        Batch.of([Segment(slot, start + at, tokens(1, slot + at), decode=True) for slot, start in starts.items()])
        for at in range(6)
    ]
    return [*(Batch.of([prompt]) for prompt in prompts), *steps]


def stored(family: str, kind: str, folder: Path) -> Model:
    """A model of a family as a checkpoint, or compressed."""
    checkpoint, spec = write(folder / "model", config_of(family), torch.bfloat16)
    if kind != "checkpoint":
        layout = store.layout(checkpoint, spec, kind)
        memory = torch.empty(max(group.nbytes for group in layout), dtype=torch.uint8)
        store.write(checkpoint, kind, layout, memory, folder / kind, 1)
        checkpoint.close()
        checkpoint = open_checkpoint(str(folder / kind))
    return Model(checkpoint, spec)


@pytest.mark.parametrize("kind", ["checkpoint", "int4"])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_logits_are_those_of_experts_in_memory(family: str, kind: str, tmp_path: Path) -> None:
    model = stored(family, kind, tmp_path)
    if kind == "checkpoint" and family in CONVERTED:
        assert not any(model.search.apart(model.formats)[1])
        return
    expected, _ = model.steps(model.resident())
    for slots, others in ((LEAST_SLOTS, "all"), (5, "least")):
        logits, placement = model.steps(model.cached(slots, others=others))
        assert isinstance(placement, CachedExperts)
        assert placement.expert_counts["used"] > 0
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))


@pytest.mark.parametrize("policy", ["lru", "lfu", "score", "static", "lru+gate", "static+gate"])
def test_every_policy_gives_the_same_logits(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "cache"))
    model = stored("mixtral", "int4", tmp_path)
    write_census(model.checkpoint.fingerprint, Census("model", 1, [[0.5] * 6] * 2))
    expected, _ = model.steps(model.resident())
    for slots in (LEAST_SLOTS, 4, 12):
        logits, placement = model.steps(model.cached(slots, policy))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(logits, expected, strict=True))
        if slots == 12:  # all of them: each is read once
            assert placement.expert_counts["read"] <= 12 * store_bytes(model)


def store_bytes(model: Model) -> int:
    """Bytes of an expert as it is stored."""
    _, experts = model.search.apart(model.formats)
    return experts[0][0].stride


def test_tokens_that_choose_the_same_expert_share_one_read_of_it(tmp_path: Path) -> None:
    model = stored("mixtral", "int4", tmp_path)
    _, placement = model.steps(model.cached(LEAST_SLOTS, "lru"))
    used = placement.expert_counts["used"]
    # Six experts in two layers, of which a prompt of 32 tokens that choose three each uses every one.
    assert used <= len(batches()) * 12
    assert placement.expert_counts["read"] <= used * store_bytes(model)


def test_a_census_is_in_memory_before_the_first_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "cache"))
    model = stored("mixtral", "int4", tmp_path)
    shares = [[0.0, 0.9, 0.0, 0.8, 0.0, 0.0], [0.7, 0.0, 0.0, 0.0, 0.6, 0.0]]
    write_census(model.checkpoint.fingerprint, Census("model", 1, shares))
    plan = model.cached(4, "static")
    arenas = Arena(plan.accounts["weights"]), Arena(plan.accounts["kv"])
    layers, shape = range(len(model.spec.layers)), start.Shape.of(plan)
    slots = Arena(plan.accounts["experts"])
    placement, _, _ = start.build(model.checkpoint, model.spec, layers, shape, *arenas, plan, slots)
    placement.load()
    assert isinstance(placement, CachedExperts)
    assert set(placement._cache._held) == {(0, 1), (0, 3), (1, 0), (1, 4)}
    placement.close()


def test_the_next_mixture_is_asked_what_it_will_choose(tmp_path: Path) -> None:
    model = stored("qwen3_moe", "int4", tmp_path)
    _, with_gate = model.steps(model.cached(12, "lru+gate"))
    _, without = model.steps(model.cached(12, "lru"))
    assert with_gate.expert_counts["foreseen"] > 0
    assert without.expert_counts["foreseen"] == 0


def test_guesses_are_right_where_the_next_layer_sees_the_same(tmp_path: Path) -> None:
    """Parts that add nothing, and norms and routers that are the same in both layers."""
    checkpoint, spec = write(tmp_path, config_of("mixtral"))
    checkpoint.close()
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "w2.weight")):
            tensor.zero_()
        elif name.endswith(("norm.weight", "gate.weight")) and "layers.1." in name:
            tensor.copy_(tensors[name.replace("layers.1.", "layers.0.")])
    save_file(tensors, tmp_path / "model.safetensors")
    model = Model(open_checkpoint(str(tmp_path)), spec)
    _, placement = model.steps(model.cached(12, "lru+gate"))
    counts = placement.expert_counts
    assert counts["foreseen"] == counts["used"] / 2  # of the second layer all, of the first none


def test_plans_with_slots_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    model = stored("mixtral", "int4", tmp_path)
    good = model.cached(4)
    assert expert_count(model.search.apart(model.formats)[1]) == 12
    assert good.experts is not None
    for experts in (None, good.experts.model_copy(update={"slots": 1})):
        with pytest.raises(UsageError, match="slots for experts"):
            start.fit_plan(model.checkpoint, model.spec, good.model_copy(update={"experts": experts}))


def test_more_slots_take_exactly_as_much_more_memory(tmp_path: Path) -> None:
    model = stored("olmoe", "int4", tmp_path)
    sizes = [model.cached(slots).accounts["experts"] for slots in (2, 4, 6)]
    # Three matrices of 48 x 40 fill 6 tiles of 288 bytes each, 5184 bytes in all, and two pages; and what Python takes.
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == 2 * (8192 + EXPERT_OBJECTS)
