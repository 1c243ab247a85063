"""Layers that share keys and values read what their owner keeps, keep nothing themselves, and are found once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny_llama

import tightfit
from tightfit.budget.ledger import ALIGNMENT, Arena, Workspace
from tightfit.catalog import spec_string
from tightfit.checkpoints.checkpoint import open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.engine.fit import Observing
from tightfit.engine.start import bits_of
from tightfit.errors import BudgetError, CheckpointError, UsageError
from tightfit.kernels import ops
from tightfit.kernels.attention import Scoring
from tightfit.kv.base import BaseCache, LayerLayout, Step
from tightfit.kv.cache import Cache
from tightfit.kv.compose import compose
from tightfit.kv.fitted import Findings, Known, findings_file, known_for, read_findings, write_findings
from tightfit.kv.make import make_cache
from tightfit.kv.paged import PagedCache
from tightfit.kv.share import kvsharer
from tightfit.kv.share.kvsharer import SAMPLE, KVSharer
from tightfit.model.batch import Batch, Segment
from tightfit.model.decoder import Decoder, cache_layouts
from tightfit.model.families import model_spec
from tightfit.plan.schema import OWN
from tightfit.weights.placement.resident import Resident

ROOM = 1 << 28
CONTEXT, CHUNK, LAYERS = 256, 48, 5
OWNERS = [0, 1, 0, 1, 0]
TOKENS = torch.randint(6000, (100,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write(tmp_path_factory.mktemp("models") / "tiny", layers=LAYERS)


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    checkpoint = open_checkpoint(str(folder))
    spec = model_spec(Config(checkpoint.config, checkpoint.name), checkpoint.tensors)
    formats = dict.fromkeys(range(LAYERS), OWN)
    placement = Resident(checkpoint, spec, OWN, formats, torch.float32, Arena(ROOM))
    placement.load()
    return Decoder(spec, placement)


class Substituting(Cache):
    """Every layer computes and keeps its own keys and values, and then those of its owner are put in their place."""

    def __init__(self, *arguments: Any, instead: Sequence[int]) -> None:
        super().__init__(*arguments)
        self.instead = instead

    def attend_step(
        self, layer: int, step: Step, held: None, q: torch.Tensor, out: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        kept, owner = self.layers[layer], self.layers[self.instead[layer]]
        ops.copy_(kept.keys, owner.keys)
        ops.copy_(kept.values, owner.values)
        super().attend_step(layer, step, held, q, out, ws, scoring)


def cache_of(decoder: Decoder, kv: str, owners: Sequence[int] | None = OWNERS, tail: int = 1) -> tuple[BaseCache, int]:
    """A cache, and the bytes that it takes."""
    layouts, arena = cache_layouts(decoder.spec, CONTEXT, CHUNK), Arena(ROOM)
    if tail > 1:
        common = compose(kv), CONTEXT, 1, torch.float32, arena, torch.float32
        return PagedCache(layouts, *common, tail=tail, known=Known(owners)), arena.used
    cache = make_cache(kv, layouts, CONTEXT, 1, torch.float32, arena, torch.float32, CHUNK, Known(owners))
    return cache, arena.used


@torch.inference_mode()
def logits(decoder: Decoder, cache: BaseCache, prompt: int = 70, verify: int = 1, chunk: int = CHUNK) -> torch.Tensor:
    """Logits of all :data:`TOKENS`, the first ones as a prompt, the others decoded ``verify`` at a time."""
    ws, rows = Workspace(Arena(ROOM)), []

    def step(segment: Segment) -> None:
        with ws.frame():
            rows.append(decoder.logits(decoder.hidden(Batch((segment,)), cache, ws), ws).clone())

    for start in range(0, prompt, chunk):
        part = TOKENS[start : min(start + chunk, prompt)]
        cache.begin(0, start)
        step(Segment(0, start, part, logits="all", length=prompt))
        cache.prefilled(0, start, start + len(part))
    at = prompt
    while at < len(TOKENS):
        part = TOKENS[at : at + min(verify, cache.room(0))]
        step(Segment(0, at, part, decode=True, logits="all"))
        cache.commit(0, range(len(part)), ws)
        at += len(part)
    return torch.cat(rows)


def test_it_computes_what_substituting_does(decoder: Decoder) -> None:
    layouts = cache_layouts(decoder.spec, CONTEXT, CHUNK)
    slow = Substituting(layouts, 1, torch.float32, Arena(ROOM), torch.float32, CHUNK, instead=OWNERS)
    wanted = logits(decoder, slow)
    for kv in ("kvsharer", "kvsharer+host(resident=0)", "kvsharer+h2o(keep=250)", "snapkv(keep=250)+kvsharer"):
        torch.testing.assert_close(logits(decoder, cache_of(decoder, kv)[0]), wanted, rtol=1e-3, atol=1e-4)
    own = logits(decoder, cache_of(decoder, "none", None)[0])
    assert (own - wanted).abs().max() > 0.1


def test_keys_and_values_that_nobody_reads_are_not_computed(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    from tightfit.model import parts

    asked = []
    project = parts.project

    def noted(weights: Any, names: tuple[str, ...], *rest: Any) -> tuple[torch.Tensor, ...]:
        asked.append(names)
        return project(weights, names, *rest)

    monkeypatch.setattr(parts, "project", noted)
    logits(decoder, cache_of(decoder, "kvsharer")[0], prompt=100, chunk=100)
    of_attention = [names for names in asked if "q_proj" in names]
    assert of_attention == [("q_proj", "k_proj", "v_proj")] * 2 + [("q_proj",)] * 3


@pytest.mark.parametrize("more", ["", "+int4", "+h2o(keep=64)", "+d2o(keep=64)+int8+think", "+quest+host"])
def test_bytes_are_exactly_that_share_fewer(decoder: Decoder, more: str) -> None:
    each = cache_of(decoder, f"kvsharer{more}", None)[1] / LAYERS
    shared = cache_of(decoder, f"kvsharer{more}")[1]
    assert abs(shared - 2 * each) <= 24 * ALIGNMENT


def test_a_chunk_is_seen_whole_by_every_layer_that_reads_it(decoder: Decoder) -> None:
    """What an owner lets go of is let go of when the last one has read it."""
    exact = logits(decoder, cache_of(decoder, "kvsharer")[0], prompt=100, chunk=100)
    cache, _ = cache_of(decoder, "kvsharer+h2o(keep=8)+int2(recent=0)")
    torch.testing.assert_close(logits(decoder, cache, prompt=100, chunk=100), exact, rtol=1e-3, atol=1e-4)
    assert isinstance(cache, PagedCache)
    assert cache.layers[0].lengths.tolist() == [[8, 8]]


def test_tokens_are_judged_by_all_layers_that_read_them(decoder: Decoder) -> None:
    """Every query of every such layer gives 1 in all, in prompts and when decoding, one by one or several at once."""
    heads = decoder.spec.layers[0].attention.heads
    for tail in (1, 4):
        cache, _ = cache_of(decoder, "kvsharer+h2o(keep=250)", tail=tail)
        logits(decoder, cache, verify=tail)
        assert isinstance(cache, PagedCache)
        for owner, readers in ((0, 3), (1, 2)):
            assert cache.store.observed is not None
            given = cache.store.observed.mass[owner].sum()
            torch.testing.assert_close(given, torch.tensor(float(readers * heads * len(TOKENS))), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kv", ["kvsharer+d2o(keep=40)+int8", "kvsharer+snapkv(keep=40,window=8)+think"])
def test_drafts_that_are_accepted_are_tokens_like_others(decoder: Decoder, kv: str) -> None:
    one, several = (logits(decoder, cache_of(decoder, kv, tail=4)[0], verify=count) for count in (1, 4))
    torch.testing.assert_close(one, several, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kv", ["kvsharer", "kvsharer+d2o(keep=40)+int8+host(resident=32)"])
def test_what_is_saved_of_a_prompt_is_what_owners_keep(decoder: Decoder, kv: str) -> None:
    """And a sequence that is restored goes on with the same bits."""
    outs: list[torch.Tensor] = []
    saved: list[torch.Tensor] = []
    for restores in (False, True):
        cache, _ = cache_of(decoder, kv)
        ws = Workspace(Arena(ROOM))
        parts = iter(saved)
        with torch.inference_mode(), ws.frame():
            cache.begin(0, 0)
            if restores:
                cache.restore(0, 0, CHUNK, lambda part, parts=parts: part.copy_(next(parts)))  # type: ignore[misc]
            else:
                decoder.hidden(Batch((Segment(0, 0, TOKENS[:CHUNK], length=100),)), cache, ws)
                cache.prefilled(0, 0, CHUNK)
                cache.save(0, 0, CHUNK, lambda part: saved.append(part.clone()))
                each = cache_of(decoder, kv, None)[0].largest_entry(CHUNK)
                assert sum(part.nbytes for part in saved) <= cache.largest_entry(CHUNK) < each / 2
            cache.begin(0, CHUNK)
            rest = Batch((Segment(0, CHUNK, TOKENS[CHUNK:], logits="all", length=100),))
            outs.append(decoder.hidden(rest, cache, ws).clone())
    assert torch.equal(*outs)


def test_layers_keep_the_average_without_those_that_keep_nothing(decoder: Decoder) -> None:
    cache, _ = cache_of(decoder, "kvsharer+h2o(keep=100,budget=pyramid)")
    assert isinstance(cache, PagedCache)
    kept = [cache.store.reserved.sizes[layer].kept for layer in cache.own]
    assert len(kept) == 2
    assert abs(sum(kept) - 200) <= 1
    assert kept[0] > kept[1]


def test_whole_prompts_layer_by_layer_are_refused(decoder: Decoder) -> None:
    cache, ws = cache_of(decoder, "kvsharer+int4")[0], Workspace(Arena(ROOM))
    with pytest.raises(UsageError, match="chunk by chunk"):
        decoder.hidden_layered(Segment(0, 0, TOKENS, length=100), CHUNK, cache, ws)
    wanted = logits(decoder, cache_of(decoder, "kvsharer")[0], prompt=100)[-1]
    with ws.frame(), torch.inference_mode():
        exact = cache_of(decoder, "kvsharer")[0]
        exact.begin(0, 0)
        hidden = decoder.hidden_layered(Segment(0, 0, TOKENS, length=100), CHUNK, exact, ws)
        torch.testing.assert_close(decoder.logits(hidden, ws)[-1], wanted)  # an exact cache has nothing to wait for


def test_latents_cannot_be_shared() -> None:
    latent = LayerLayout(1, 12, 9, 31, shared=True)
    with pytest.raises(UsageError, match="cannot use kvsharer"):
        make_cache("kvsharer", [latent] * 2, 31, 1, torch.float32, Arena(ROOM), torch.float32, 8)
    for kv in ("kvsharer(share=0)", "kvsharer(threshold=2)", "kvsharer+kvsharer"):
        with pytest.raises(UsageError):
            compose(kv)


# ---- finding layers ----


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    with tightfit.load(str(folder), memory="2GiB", context=CONTEXT, chunk=CHUNK) as loaded:
        yield loaded


def keys_and_values(model: tightfit.Model, samples: list[list[int]]) -> list[list[torch.Tensor]]:
    """Of each layer keys and values, averaged over texts."""
    engine = model._generator.engine
    sums = [[torch.zeros(()) for _ in range(2)] for _ in range(LAYERS)]
    for sample in samples:
        model.score(sample)
        assert isinstance(engine.cache, Cache)
        for both, kept in zip(sums, engine.cache.layers, strict=True):
            for index, kind in enumerate((kept.keys, kept.values)):
                both[index] = both[index] + kind[0, :, : len(sample)].float() / len(samples)
    return sums


def observed(model: tightfit.Model, tokens: list[int], budget: int = 1 << 40) -> Observing:
    return Observing(model.borrow_engine(), "tiny", tokens, model.tokenizer.encode, budget)


def find(model: tightfit.Model, method: KVSharer, tokens: list[int]) -> Findings:
    return method.fit(observed(model, tokens), lambda done, total: None)


def test_the_most_dissimilar_layers_share_first(model: tightfit.Model) -> None:
    tokens = (TOKENS * 2)[: 3 * SAMPLE]
    samples = [tokens[at : at + SAMPLE] for at in range(0, len(tokens), SAMPLE)]
    means = keys_and_values(model, samples)

    def distance(a: int, b: int) -> float:
        return sum(float((x - y).norm(dim=-1).mean()) for x, y in zip(means[a], means[b], strict=True))

    owners, left = list(range(LAYERS)), 3
    for a, b in sorted(combinations(range(LAYERS), 2), key=lambda pair: -distance(*pair)):
        if left and owners[b] == b:
            owners, left = [owners[a] if owner == b else owner for owner in owners], left - 1
    tried: list[tuple[int, int]] = []
    found = KVSharer(0.6, -1.0).fit(observed(model, tokens), lambda done, total: tried.append((done, total)))
    assert found.tensors["owners"].tolist() == found.report["owners"] == owners
    assert found.report["tokens"] == len(tokens)
    assert -1 < found.report["similarity"] < 1
    assert tried[0] == (1, 10)


def test_pairs_that_change_too_much_are_not_taken(model: tightfit.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def similarity(model: object, samples: object, originals: object, owners: list[int]) -> float:
        asked.append(owners)
        return 0.9 if len(asked) == 3 else 0.4

    monkeypatch.setattr(kvsharer, "_similarity", similarity)
    found = find(model, KVSharer(0.2, 0.5), TOKENS)
    assert found.report["owners"] == asked[2]
    assert found.report["similarity"] == 0.9
    assert len(asked) == 3
    with pytest.raises(UsageError, match="only 0 layers of tiny can share"):
        find(model, KVSharer(0.2, 0.95), TOKENS)


def test_looking_for_layers_leaves_the_model_as_it_was(model: tightfit.Model) -> None:
    before = model.score(TOKENS)
    find(model, KVSharer(0.4, -1.0), TOKENS)
    assert model.score(TOKENS) == before
    with pytest.raises(UsageError, match="the text has 10 tokens"):
        find(model, KVSharer(), TOKENS[:10])


def test_a_budget_that_leaves_no_room_is_refused(model: tightfit.Model) -> None:
    with pytest.raises(BudgetError, match="looking at 64 tokens takes") as refused:
        KVSharer().fit(observed(model, TOKENS, budget=1 << 20), lambda done, total: None)
    assert "--memory" in str(refused.value.hint)


def findings_of(owners: list[int]) -> Findings:
    return Findings({"owners": torch.tensor(owners)}, {"owners": owners}, [])


def test_prompts_that_were_kept_under_other_owners_are_not_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spec string is the same after layers were looked for with another text."""
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path))
    checkpoint = open_checkpoint(str(folder))
    names = set()
    for owners in ([0, 0, 2, 3, 4], [0, 1, 0, 3, 4], [0, 1, 0, 3, 4]):
        write_findings(checkpoint.fingerprint, KVSharer(), findings_of(owners))
        with tightfit.load(str(folder), memory="2GiB", context=CONTEXT, chunk=CHUNK, kv="kvsharer") as loaded:
            assert loaded._generator.engine.cache.owners == owners
            names.add(bits_of(loaded.plan))
    checkpoint.close()
    assert len(names) == 2


def test_what_was_found_is_kept_for_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "new"))
    method, owners, of = KVSharer(0.4), [0, 1, 0, 3, 0], ("tiny", "f" * 64)
    with pytest.raises(CheckpointError, match="what kvsharer must know of tiny was never looked for") as never:
        read_findings(*of, method, LAYERS)
    assert f"tightfit fit MODEL --kv '{spec_string(method)}' --text FILE" in str(never.value.hint)
    file = write_findings("f" * 64, method, findings_of(owners))
    assert read_findings(*of, method, LAYERS)["owners"].tolist() == owners
    assert known_for([method], *of, LAYERS).owners == owners
    assert known_for([], *of, LAYERS).owners is None
    for other in (KVSharer(), KVSharer(0.4, 0.6)):
        assert findings_file("f" * 64, other) != file
    for wrong in ([0, 0, 1, 3, 4], owners[:4], [0, 1, 2, 3, 4]):
        write_findings("f" * 64, method, findings_of(wrong))
        with pytest.raises(CheckpointError, match="is not what kvsharer must know"):
            read_findings(*of, method, LAYERS)
    for data in (b"", b"[]", file.read_bytes()[:-4]):
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match="is not what kvsharer must know"):
            read_findings(*of, method, LAYERS)
