"""Checkpoints whose layers were trained to read other layers' keys and values run as they are: LCKV, MixAttention."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny_llama
from tests.kv.driver import Run, Tiny
from tests.model.families.sharing_network import DIM, KV_HEADS, WORDS, SharingLlama, train, woven
from tests.model.test_families import SIZES
from tests.parity.harness import ROOM

import tightfit
from tightfit.budget.ledger import ALIGNMENT, Arena
from tightfit.checkpoints.checkpoint import open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.errors import CheckpointError, UsageError
from tightfit.kv.compose import compose, known_of
from tightfit.kv.fitted import Known
from tightfit.kv.make import kv_nbytes
from tightfit.kv.paged import PagedCache
from tightfit.model.batch import Segment
from tightfit.model.decoder import Decoder, cache_layouts
from tightfit.model.families import model_spec
from tightfit.model.spec import ModelSpec
from tightfit.plan.schema import OWN
from tightfit.weights.placement.resident import Resident

LCKV, MIX = "0_2_2_3", "0_1s_1s_0_1s"
STEPS = 80
LAYOUTS = {
    "LCKV, a warm-up layer at both ends": SharingLlama(LCKV),
    "LCKV, all layers read the last": SharingLlama("3_3_3_3"),
    "LCKV in the middle": SharingLlama("0_2_2_2_2"),
    "LCKV in two stretches": SharingLlama("1_1_3_3"),
    "LCKV with a window": SharingLlama("0_2s_2s_3"),
    "no token sees itself": SharingLlama("0_1_2", nodiag=True),
    "MixAttention": SharingLlama(MIX),
    "YOCO": SharingLlama("0s_1s_2_2"),
}


def decoder_of(network: SharingLlama, folder: Path, **config: Any) -> Tiny:
    checkpoint = open_checkpoint(str(network.save(folder, **config)))
    spec = model_spec(Config(checkpoint.config, checkpoint.name), checkpoint.tensors)
    formats = dict.fromkeys(range(len(spec.layers)), OWN)
    placement = Resident(checkpoint, spec, OWN, formats, torch.float32, Arena(ROOM))
    placement.load()
    checkpoint.close()
    return Tiny(None, spec, Decoder(spec, placement), torch.float32)  # type: ignore[arg-type]


def run(tiny: Tiny, kv: str = "none", **settings: Any) -> Run:
    return Run(tiny, kv, known=Known(tiny.spec.owners), **settings)


@torch.no_grad()
def theirs(network: SharingLlama, tokens: list[int], prompt: int, chunk: int, passes: int) -> torch.Tensor:
    """Logits of the prompt's last token and of those that decode, with prompts as the public code computes them."""
    kept, logits = None, []
    for start in range(0, prompt, chunk):
        part = tokens[start : min(start + chunk, prompt)]
        found, kept = network(torch.tensor([part]), passes, kept)
    logits.append(found[0, -1])
    for token in tokens[prompt:]:
        found, kept = network(torch.tensor([[token]]), 1, kept)
        logits.append(found[0, -1])
    return torch.stack(logits)


def ours(run: Run, tokens: list[int], prompt: int) -> torch.Tensor:
    return torch.stack([run.prefill(tokens[:prompt]), *(run.decode(token) for token in tokens[prompt:])])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv", ["none", "host(resident=32)"])
def test_logits_are_those_of_the_network(tmp_path: Path, layout: str, kv: str) -> None:
    """Of prompts in chunks, and of what decodes behind them."""
    network = LAYOUTS[layout]
    tiny = decoder_of(network, tmp_path, forward_passes=3, backward_passes=1)
    tokens = tiny.tokens(60)
    expected = theirs(network, tokens, prompt=44, chunk=32, passes=4)
    torch.testing.assert_close(ours(run(tiny, kv, chunk=32), tokens, 44), expected, rtol=1e-4, atol=1e-4)


def test_passes_come_to_what_one_token_after_the_other_gives(tmp_path: Path) -> None:
    """Which is what `use_sequential` asks for; fewer passes are an approximation of it."""
    network = LAYOUTS["LCKV, all layers read the last"]
    tokens = torch.randint(64, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    one_by_one = theirs(network, tokens, prompt=30, chunk=1, passes=1)
    exact = decoder_of(network, tmp_path / "exact", use_sequential=True)
    torch.testing.assert_close(ours(run(exact), tokens, 30), one_by_one, rtol=1e-4, atol=1e-4)
    fewer = decoder_of(network, tmp_path / "fewer", forward_passes=1, backward_passes=1)
    assert (ours(run(fewer), tokens, 30) - one_by_one).abs().max() > 1e-2


@pytest.mark.parametrize(("layout", "most"), [(LCKV, 0.75), (MIX, 0.25)])
def test_a_trained_one_works_and_its_cache_has_the_bytes_of_its_own_layers(
    tmp_path: Path, layout: str, most: float
) -> None:
    """What it learned is there when it decodes; exactly its layers with keys of their own take bytes, of a window as
    much as a window and a chunk."""
    network = SharingLlama(layout)
    assert train(network, STEPS) < 0.1 * math.log(WORDS)  # nats of who knows the words and nothing else
    tiny = decoder_of(network, tmp_path)
    [tokens] = woven(1, torch.Generator().manual_seed(3)).tolist()
    running = run(tiny)
    logits, found = running.prefill(tokens[:12]), []
    for _ in range(12):
        found.append(int(logits.argmax()))
        logits = running.decode(found[-1])
    assert sum(a == b for a, b in zip(found, tokens[12:], strict=True)) >= 10

    context, chunk = 512, 64
    token_bytes = 2 * KV_HEADS * DIM * 4
    own = [layer for layer, owner in enumerate(network.owners) if layer == owner]
    expected = sum(token_bytes * (network.window - 1 + chunk if network.slides[layer] else context) for layer in own)
    layouts = cache_layouts(tiny.spec, context, chunk)
    taken = kv_nbytes("none", layouts, context, 1, "float32", Known(tiny.spec.owners))
    assert expected <= taken <= expected + 2 * len(own) * ALIGNMENT
    assert taken <= most * 1.01 * token_bytes * context * len(network.owners)


@pytest.mark.parametrize("layout", [LCKV, MIX])
def test_bits_do_not_depend_on_other_sequences(tmp_path: Path, layout: str) -> None:
    """A step may decode one sequence while another's prompt goes through layers several times."""
    tiny = decoder_of(SharingLlama(layout), tmp_path)
    tokens = tiny.tokens(24)
    alone, both = run(tiny, sequences=2), run(tiny, sequences=2)
    for each in (alone, both):
        each.prefill(tokens)
    expected = alone.decode(7)
    prompt = Segment(1, 0, tiny.tokens(20, seed=5))
    decoded = Segment(0, 24, [7], decode=True)
    both.cache.begin(1, 0)
    logits = both.step(decoded, prompt)
    assert torch.equal(logits[0], expected)


@pytest.mark.parametrize(
    "kv", ["int8(recent=32)", "window(keep=48)", "think(prune=0.1)+int8(recent=32)", "quest(full=0)"]
)
@pytest.mark.parametrize("layout", [LCKV, MIX])
def test_methods_hold_what_such_layers_keep(tmp_path: Path, layout: str, kv: str) -> None:
    """Close to the exact cache where a method loses little: here for prompts within what stays."""
    tiny = decoder_of(SharingLlama(layout), tmp_path)
    tokens = tiny.tokens(70)
    prompt = 40
    exact = ours(run(tiny, chunk=16), tokens[:48], prompt)
    close = ours(run(tiny, kv, chunk=16), tokens[:48], prompt)
    assert (close - exact).abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize("kv", ["none", "int8(recent=0)"])
def test_saved_prompts_go_on_with_the_same_bits(tmp_path: Path, kv: str) -> None:
    tiny = decoder_of(SharingLlama(LCKV), tmp_path)
    tokens, parts = tiny.tokens(40), []
    first, second = run(tiny, kv, chunk=32), run(tiny, kv, chunk=32)
    first.prefill(tokens[:32])
    first.cache.save(0, 0, 32, lambda part: parts.append(part.clone()))
    second.cache.restore(0, 0, 32, lambda part: part.copy_(parts.pop(0)))  # type: ignore[arg-type,return-value]
    second.lengths[0] = 32
    assert torch.equal(first.prefill(tokens[32:]), second.prefill(tokens[32:]))
    assert torch.equal(first.decode(3), second.decode(3))


def test_what_such_layers_cannot_do_is_refused(tmp_path: Path) -> None:
    tiny = decoder_of(SharingLlama(LCKV), tmp_path)
    running = run(tiny)
    running.prefill(tiny.tokens(8))
    assert running.cache.room(0) == 1  # a draft needs the token before it
    with pytest.raises(ValueError, match="cannot be computed with it"):
        running.verify([1, 2])
    for kv in ("none", "int8"):
        with pytest.raises(UsageError, match="chunk by chunk"):
            run(tiny, kv).prefill(tiny.tokens(8), layered=True)
    with pytest.raises(UsageError, match="do not see themselves"):
        compose("h2o").check(cache_layouts(tiny.spec, 64, 16))
    with pytest.raises(UsageError, match="trained to read what others keep"):
        known_of("kvsharer", "tiny", "", tiny.spec.owners)


def test_drafts_are_verified_where_layers_read_earlier_ones(tmp_path: Path) -> None:
    tiny = decoder_of(SharingLlama(MIX), tmp_path)
    tokens = tiny.tokens(30)
    one_by_one = run(tiny, chunk=16)
    expected = ours(one_by_one, tokens, 24)[1:]
    drafts = run(tiny, chunk=16)
    drafts.prefill(tokens[:24])
    assert torch.equal(drafts.verify(tokens[24:]), expected)


@pytest.mark.parametrize(
    ("layer_types", "message"),
    [
        ("0", "2 numbers of layers"),
        ("0_2", "2 numbers of layers"),
        ("0_1t", "2 numbers of layers"),
        ("1_0", "layer 1, which 0 reads, to read itself"),
        ("0_0s", "layer 0, which 1 reads, to read itself as 1 does"),
    ],
)
def test_layouts_that_cannot_be_are_refused(layer_types: str, message: str) -> None:
    config = Config(SIZES | {"model_type": "lckv-llama", "layer_types": layer_types}, "test")
    with pytest.raises(CheckpointError, match=message):
        model_spec(config, [])


def test_a_part_of_a_model_keeps_who_reads_whom() -> None:
    """Plans rehearse one layer of each kind, with those that it reads."""
    values = SIZES | {"model_type": "lckv-llama", "num_hidden_layers": 5, "layer_types": "0_3_3_3_4"}
    spec = model_spec(Config(values, "test"), [])
    assert spec.stretches == ((range(1), False), (range(1, 4), True), (range(4, 5), False))
    part: ModelSpec = spec.part([0, 1, 3])
    assert part.owners == [0, 2, 2]
    assert part.passes == spec.passes == 9
    assert part.stretches == ((range(1), False), (range(1, 3), True))


def test_planned_and_run_inside_a_budget(tmp_path: Path) -> None:
    folder = tiny_llama.write(tmp_path, layers=4, model_type="lckv-llama", layer_types="0_2_2_3")
    reserved = {}
    for kv in ("none", "int8(recent=32)"):
        with tightfit.load(str(folder), "1GiB", context=128, chunk=16, kv=kv) as model:
            assert model.generate("once upon a time " * 4, max_new_tokens=8)
            reserved[kv] = model.receipt()["accounts"]["kv"]["reserved_bytes"]
    with tightfit.load(str(tiny_llama.write(tmp_path, layers=4)), "1GiB", context=128, chunk=16) as model:
        model.generate("once", max_new_tokens=2)
        every = model.receipt()["accounts"]["kv"]["reserved_bytes"]
    assert reserved["none"] < 0.8 * every


def test_the_paged_cache_keeps_one_copy(tmp_path: Path) -> None:
    tiny = decoder_of(SharingLlama(LCKV), tmp_path)
    cache = run(tiny, "int4").cache
    assert isinstance(cache, PagedCache)
    assert len({id(pages) for pages in cache.layers}) == 3
