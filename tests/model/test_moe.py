"""Mixtures of experts: only chosen experts are touched, and the worst routing stays within what was foreseen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_mixtures import CONFIGS, config_of, write

from tightfit.budget.ledger import Arena, Workspace
from tightfit.checkpoints.checkpoint import open_checkpoint
from tightfit.engine import start
from tightfit.kernels import ops
from tightfit.kv.cache import Cache
from tightfit.model.batch import Batch, Segment
from tightfit.model.decoder import Decoder
from tightfit.model.spec import MoeSpec
from tightfit.plan.schema import Numerics
from tightfit.plan.search import Search
from tightfit.plan.sizes import Constraints
from tightfit.weights.placement.base import Experts, Parameters, StackedExperts
from tightfit.weights.placement.resident import ExpertMatrices

CONTEXT, CHUNK = 64, 32


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models are tiny: more threads only cost time."""
    torch.set_num_threads(1)


@pytest.fixture(params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Running:
    """A small model with its weights loaded, ready for batches of four sequences."""

    def __init__(self, folder: Path, family: str, weights: str = "own", **changes: Any) -> None:
        self.checkpoint, self.spec = write(folder, config_of(family, **changes))
        request = Constraints(
            1 << 30,
            CONTEXT,
            4,
            1,
            Numerics(gemm="float32", kv="float32", activations="float32"),
            weights=weights,
            chunk=CHUNK,
        )
        self.plan = Search(self.checkpoint, self.spec, request, self._workspace).uniform(weights, CHUNK, 0)
        self.shape = start.Shape.of(self.plan)
        self.decoder: Decoder
        self.cache: Cache
        self.load()

    def load(self) -> None:
        layers = range(len(self.spec.layers))
        arenas = Arena(self.plan.accounts["weights"]), Arena(self.plan.accounts["kv"])
        self.placement, self.decoder, self.cache = start.build(self.checkpoint, self.spec, layers, self.shape, *arenas)
        self.placement.load()

    def _workspace(self, plan: Any) -> int:
        return start.workspace_bytes(self.checkpoint, self.spec, plan)

    @torch.inference_mode()
    def step(self, *segments: Segment) -> tuple[torch.Tensor, int]:
        """The logits of a batch, and how much scratch they took."""
        ws = Workspace(Arena(1 << 30))
        with ws.frame():
            batch = Batch.of(segments)
            return self.decoder.logits(self.decoder.hidden(batch, self.cache, ws), ws).clone(), ws.high_water


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_decoding_one_token_touches_only_the_experts_it_chose(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Running(tmp_path, family)
    model.step(Segment(0, 0, tokens(CHUNK)))
    used: set[tuple[int, int]] = set()
    use = StackedExperts.use

    def noted(experts: StackedExperts, expert: int) -> Any:
        used.update((stack._data.data_ptr(), expert) for stack in matrices_of(experts))
        return use(experts, expert)

    monkeypatch.setattr(StackedExperts, "use", noted)
    one = Segment(0, CHUNK, tokens(1), decode=True)
    logits, _ = model.step(one)
    mixtures = [layer.mlp for layer in model.spec.layers if isinstance(layer.mlp, MoeSpec)]
    assert len(used) == sum(3 * mixture.experts_per_token for mixture in mixtures)  # gate, up and down of each
    poisoned = 0
    for layer in range(len(model.spec.layers)):
        with model.placement.layer(layer) as weights:
            for stack in matrices_of(weights.experts):
                for expert in range(len(stack)):
                    if (stack._data.data_ptr(), expert) not in used:
                        stack._data[expert].view(torch.float32).fill_(torch.nan)
                        poisoned += 1
    assert poisoned == sum(3 * (mixture.experts - mixture.experts_per_token) for mixture in mixtures)
    again, _ = model.step(one)
    assert torch.equal(again, logits)


def stacks_of(weights: Parameters) -> Mapping[str, Any]:
    """The parameters of all experts of a layer, if it has any."""
    return weights.experts._stacks if isinstance(weights.experts, StackedExperts) else {}


def matrices_of(experts: Experts | None) -> list[ExpertMatrices]:
    """Those of all experts of a layer, if it has any."""
    stacks = experts._stacks.values() if isinstance(experts, StackedExperts) else ()
    return [stack for stack in stacks if isinstance(stack, ExpertMatrices)]


def largest(seed: int = 0) -> list[Segment]:
    """A whole chunk at the end of the context, and all other sequences decoding."""
    prefill = Segment(0, CONTEXT - CHUNK, tokens(CHUNK, seed), logits="last")
    return [prefill, *(Segment(slot, CONTEXT - 1, tokens(1, slot), decode=True) for slot in (1, 2, 3))]


def test_scratch_is_foreseen_for_experts_that_everyone_wants(family: str, tmp_path: Path) -> None:
    model = Running(tmp_path, family)
    foreseen = model.plan.accounts["workspace"]
    _, spread = model.step(*largest())
    # Routers of zeros score all experts alike: then every token chooses the same ones.
    for layer in range(len(model.spec.layers)):
        with model.placement.layer(layer) as weights:
            if "router" in weights:
                weights["router"].weight.data.zero_()
    wanted: list[int] = []
    route = ops.route

    def noted(*arguments: Any) -> None:
        route(*arguments)
        if not ops.is_dry():
            wanted.append(int(arguments[9].flatten().bincount().max()))

    ops.route = noted
    try:
        _, crowded = model.step(*largest())
    finally:
        ops.route = route
    assert min(wanted) == CHUNK + 3  # an expert that every token chose
    assert spread <= crowded
    exact = Workspace(Arena(start.VIRTUAL))
    with torch.inference_mode(), ops.dry(), exact.frame():
        batch = Batch.of(largest())
        model.decoder.logits(model.decoder.hidden(batch, model.cache, exact), exact)
    assert crowded <= exact.high_water <= foreseen
    assert exact.high_water < 1.1 * crowded  # refusing what would have fitted is as bad


def test_the_engine_rehearses_and_starts_mixtures(family: str, tmp_path: Path) -> None:
    model = Running(tmp_path, family, weights="int8")
    assert start.rehearse(model.checkpoint, model.spec, model.plan) > 0
    engine, ledger = start.start(model.checkpoint, model.spec, model.plan)
    assert ledger.accounts["weights"].reserved == model.plan.accounts["weights"]
    scores = engine.score(tokens(CONTEXT))
    expected = model.step(Segment(0, 0, tokens(CHUNK), logits="all"))[0].log_softmax(-1)
    for position in range(CHUNK - 1):
        assert scores[position] == pytest.approx(float(expected[position, tokens(CHUNK)[position + 1]]), abs=1e-4)


@pytest.mark.parametrize("weights", ["own", "int8", "int4"])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(weights: str, family: str, tmp_path: Path) -> None:
    model = Running(tmp_path, family, weights)
    prompts = [tokens(length, length) for length in (CHUNK, 7, 19)]
    prefills = [Segment(slot, 0, prompt, logits="all") for slot, prompt in enumerate(prompts)]
    decodes = [Segment(slot, len(prompt), [slot], decode=True) for slot, prompt in enumerate(prompts)]

    def rows(batches: Sequence[Sequence[Segment]]) -> list[torch.Tensor]:
        return [model.step(*batch)[0] for batch in batches]

    together = rows([prefills]), rows([decodes])
    alone = rows([[segment] for segment in prefills]), rows([[segment] for segment in decodes])
    for one, many in zip(alone, together, strict=True):
        assert torch.equal(torch.cat(one), many[0])


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounded_weights_compute_what_their_numbers_say(weights: str, family: str, tmp_path: Path) -> None:
    """Rounds a model, writes the rounded numbers in float32, and compares: no row or slice of a matrix is misread."""
    rounded = Running(tmp_path / "a", family, weights)
    exact = tmp_path / "a" / "model.safetensors"
    tensors = load_file(exact)
    scratch = Workspace(Arena(1 << 24))
    layers = [*range(len(rounded.spec.layers)), None]
    for layer in layers:
        params = rounded.spec.params if layer is None else rounded.spec.layers[layer].params
        for param in params:
            if not param.is_matrix:
                continue
            for expert in range(max(param.experts, 1)):
                stored = rounded.placement.model if layer is None else rounded.placement._layers[layer]
                of_experts = stacks_of(stored)
                name = param.name.removeprefix("experts.")
                matrix = of_experts[name][expert] if param.experts else stored[name]
                numbers = torch.empty(*param.shape)
                matrix.decode(torch.arange(param.shape[0]), numbers, scratch)
                source = param.source
                tensor = tensors[source.key.format(expert=expert)]
                tensor = tensor[expert] if source.stacked else tensor
                view = tensor.T if source.transposed else tensor
                view[source.start : source.start + (param.shape[0] - 1) * source.step + 1 : source.step] = numbers
    plain = Running(tmp_path / "b", family)
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    plain.checkpoint = open_checkpoint(str(tmp_path / "b"))
    plain.load()
    prompt = tokens(CHUNK)
    for segment in (Segment(0, 0, prompt, logits="all"), Segment(0, CHUNK, tokens(1), decode=True)):
        found, expected = rounded.step(segment)[0], plain.step(segment)[0]
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
