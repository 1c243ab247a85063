"""Drafts that are refused leave no trace: tokens, and the bits of their logits, are those of plain decoding."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.kv.driver import Run, Tiny, choose
from tests.kv.slow_reference import owners

from tightfit.kv.base import BLOCK
from tightfit.kv.fitted import Known
from tightfit.kv.paged import PagedCache
from tightfit.model.batch import Segment

CONTEXT = 320
DECODED = 72  # over two boundaries at least
COMPOSITIONS = [
    "none",
    "window(keep=40)",
    "window(keep=70,positions=original,sinks=1)+int4(recent=32)",
    "h2o(keep=48)",
    "h2o(keep=64,normalize=true)+int2(recent=0)",
    "h2o(keep=40,budget=adakv)+int8(recent=32,of=keys)+int4(recent=32,of=values)",
    "snapkv(keep=40,window=8)",
    "snapkv(keep=0.5,window=16,budget=pyramid)+int4(recent=0)",
    "snapkv(keep=48,window=8,budget=adakv)+host(resident=32)",
    "snapkv(keep=48,window=8,budget=dynamickv)+int4(recent=0)",
    "h2o(keep=48,budget=dynamickv)+int8(recent=32)+host(resident=32)",
    "d2o(keep=48,recent=0.25)",
    "tova(keep=48)",
    "corm(keep=48,window=8)+int4(recent=0)",
    "morphkv(keep=48,window=40,fusion=max)+host(resident=32)",
    "scissorhands(keep=48,recent=8,window=12)",
    "scope(keep=64,output=30,recent=8)",
    "d2o(keep=64,budget=adakv)+int4(recent=0)+host(resident=32)",
    "int4(recent=0)",
    "int8(recent=32)+host(resident=32)",
    "quest(tokens=64,full=1)",
    "recycled(tokens=32,full=0,stride=5)",
    "h2o(keep=64)+clusterkv(tokens=32,full=0,size=6,every=32,sinks=2)+int4(recent=32)+host(resident=32)",
    "snapkv(keep=64,window=8,budget=adakv)+squeezed(tokens=32,full=0,size=4,prefix=40)+host(resident=0)",
    "d2o(keep=70)+alisa(tokens=32,full=0,steps=3)+int4(recent=0)",
    "h2o(keep=64)+recycled(tokens=32,full=1,stride=40,similar=0.7)+int4(recent=32)",
    "quest(tokens=32,full=0)+int4(recent=32)+host(resident=32)",
    "h2o(keep=64,budget=adakv)+int4(recent=32)+quest(tokens=32,full=0)+host(resident=0)",
]
PRUNED = ["think", "snapkv(keep=64,window=8)+think(recent=0)+int4(recent=0)+quest(tokens=32,full=1)+host(resident=0)"]
SHARED = ["kvsharer", "h2o(keep=48)+int4(recent=0)+kvsharer", "snapkv(keep=40,window=8,budget=adakv)+kvsharer"]
SHARED += ["scissorhands(keep=48,recent=8)+kvsharer"]
CASES = [("llama", kv) for kv in COMPOSITIONS + PRUNED + SHARED] + [
    (model, kv.replace("window(keep=40)", "window(keep=40,positions=original)"))
    for model in ("sliding", "latent")
    for kv in COMPOSITIONS
]
# Examples are few numbers already: shrinking them would take longer than it helps.
hypotheses = settings(
    deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def draft(
    right: Sequence[int], size: int, vocab: int, kind: str, accuracy: float, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Tokens and parents of a chain, or of a tree of any shape with several roots; a token is with a probability of
    ``accuracy`` the one of ``right``, those that come next."""
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    for index in range(size):
        parent = index - 1 if kind == "chain" else rng.randrange(-1, index)
        depth = depths[parent] + 1 if parent >= 0 else 0
        tokens.append(right[depth] if rng.random() < accuracy else rng.randrange(vocab))
        parents.append(parent)
        depths.append(depth)
    return tokens, parents


def accepted(
    tokens: Sequence[int], parents: Sequence[int], logits: torch.Tensor, after: torch.Tensor, start: int
) -> list[int]:
    """The longest path from a root along which every token is the one that the model gives; ``after`` are the logits
    before the roots."""
    path: list[int] = []
    while True:
        wanted = choose(after, start + len(path))
        last = path[-1] if path else -1
        found = [i for i, token in enumerate(tokens) if parents[i] == last and token == wanted]
        if not found:
            return path
        path.append(found[0])
        after = logits[found[0]]


def drafted(
    run: Run, after: torch.Tensor, plain: Sequence[int], kind: str, accuracy: float, seed: int, slot: int = 0
) -> tuple[list[int], list[torch.Tensor]]:
    """Decodes as many tokens as ``plain`` has by verifying drafts; gives them, and the logits after each."""
    rng = random.Random(seed)
    tokens: list[int] = []
    logits: list[torch.Tensor] = []
    begun = run.lengths[slot]
    while len(tokens) < len(plain):
        at = run.lengths[slot]
        room = min(run.cache.room(slot), 24)
        assert room >= 1
        size = rng.randint(1, min(room, len(plain) - len(tokens)))
        words, parents = draft(plain[at - begun :], size, run.tiny.spec.vocab_size, kind, accuracy, rng)
        if rng.random() < 0.3 or size == 1:  # the first token is known to be right, as after sampling
            words[0] = choose(after, at)
        found = run.verify(words, None if kind == "chain" else parents, slot)
        path = accepted(words, parents, found, after, at)
        run.commit(path, slot)
        tokens += [words[index] for index in path]
        logits += [found[index] for index in path]
        after = logits[-1] if path else after
    return tokens, logits


@pytest.mark.parametrize(("model", "kv"), CASES)
@settings(hypotheses, max_examples=2)
@given(
    kind=st.sampled_from(["chain", "tree"]),
    tail=st.sampled_from([2, 5, 16, 40]),
    prompt=st.integers(1, 130),
    accuracy=st.sampled_from([0.2, 0.6, 0.9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layered=st.booleans(),
    seed=st.integers(0, 999),
)
def test_drafts_leave_the_same_bits_as_plain_decoding(
    tiny: Callable[..., Tiny],
    model: str,
    kv: str,
    kind: str,
    tail: int,
    prompt: int,
    accuracy: float,
    dtype: torch.dtype,
    layered: bool,
    seed: int,
) -> None:
    small = tiny(model, dtype)
    tokens = small.tokens(prompt, seed)
    whose = owners(kv, len(small.spec.layers))
    plain, verified = (small.run(kv, context=CONTEXT, chunk=48, tail=t, known=Known(whose)) for t in (1, tail))
    layered = layered and kv not in SHARED
    first, same = plain.prefill(tokens, layered=layered), verified.prefill(tokens, layered=layered)
    assert torch.equal(first, same)
    expected, expected_logits = plain.generate(first, DECODED)
    found, found_logits = drafted(verified, first, expected, kind, accuracy, seed)
    assert found == expected
    for at, (a, b) in enumerate(zip(found_logits, expected_logits, strict=True)):
        assert torch.equal(a, b), f"logits of decoded token {at} differ by {(a - b).abs().max():.2g}"
    if isinstance(plain.cache, PagedCache):
        assert statistics_of(plain) == statistics_of(verified)


def statistics_of(run: Run) -> list[object]:
    """By what each head will judge its tokens: their positions, and what they received."""
    layers, kept = range(len(run.paged.layers)), run.paged.layers
    heads = [(layer, head) for layer in layers for head in range(kept[layer].table.shape[1])]
    found: list[object] = [run.positions(layer, head) for layer, head in heads]
    if run.paged.store.observed is not None:
        mass = run.paged.store.observed.mass
        found += [mass[layer][0, head, :, : len(run.positions(layer, head))].tolist() for layer, head in heads]
    return found


@pytest.mark.parametrize("kv", [kv for kv in COMPOSITIONS if "+" not in kv] + PRUNED)
@settings(hypotheses, max_examples=2)
@given(seed=st.integers(0, 999), prompts=st.tuples(st.integers(1, 100), st.integers(1, 100)))
def test_drafts_of_one_sequence_do_not_touch_those_that_decode_and_prefill_beside_it(
    tiny: Callable[..., Tiny], kv: str, seed: int, prompts: tuple[int, int]
) -> None:
    small, rng = tiny("llama"), random.Random(seed)
    words = [small.tokens(count, seed + count) for count in (*prompts, 140)]
    alone, firsts = [], []
    for tokens in words:
        run = small.run(kv, context=CONTEXT, chunk=48)
        firsts.append(run.prefill(tokens))
        alone.append(run.generate(firsts[-1], 40))

    run = small.run(kv, context=CONTEXT, chunk=48, tail=8, sequences=3)
    after = [run.prefill(words[0], 0), run.prefill(words[1], 1)]
    assert torch.equal(after[0], firsts[0])
    assert torch.equal(after[1], firsts[1])
    done, prefilled, last = [0, 0], 0, None
    while min(done) < 40:
        segments, drafts = [], []
        for slot in (0, 1):
            start, left = run.lengths[slot], 40 - done[slot]
            if not left:
                drafts.append(None)
                continue
            # One of them has a draft, the other a token.
            size = 1 if slot == len(segments) % 2 else rng.randint(1, min(run.cache.room(slot), left))
            tokens, parents = draft(alone[slot][0][done[slot] :], size, small.spec.vocab_size, "tree", 0.7, rng)
            tokens[0] = choose(after[slot], start)
            drafts.append((tokens, parents))
            segments.append(Segment(slot, start, tokens, decode=True, logits="all", parents=parents))
        if prefilled < 140:
            part = words[2][prefilled : prefilled + 48]
            run.cache.begin(2, prefilled)
            segments.append(Segment(2, prefilled, part, length=140))
        logits = run.step(*segments)
        if prefilled < 140:
            prefilled += len(part)
            run.cache.prefilled(2, prefilled - len(part), prefilled)
            last = logits[-1]
        for slot, proposed in enumerate(drafts):
            if proposed is None:
                continue
            tokens, parents = proposed
            mine, logits = logits[: len(tokens)], logits[len(tokens) :]
            path = accepted(tokens, parents, mine, after[slot], run.lengths[slot])
            run.commit(path, slot)
            for index in path:
                assert torch.equal(mine[index], alone[slot][1][done[slot]])
                done[slot] += 1
            after[slot] = mine[path[-1]]
    assert last is not None
    assert torch.equal(last, firsts[2])


@given(tail=st.integers(1, 70), prompt=st.integers(0, 100), steps=st.lists(st.integers(0, 70), max_size=20))
@settings(hypotheses, max_examples=30)
def test_room_ends_where_the_cache_lets_go_of_tokens(
    tiny: Callable[..., Tiny], tail: int, prompt: int, steps: list[int]
) -> None:
    run = tiny("llama").run("h2o(keep=40)", context=CONTEXT, tail=tail)
    run.prefill([1] * prompt) if prompt else run.cache.begin(0, 0)
    tokens = prompt
    for step in steps:
        room = run.cache.room(0)
        assert 1 <= room <= tail
        assert tokens // BLOCK == (tokens + room - 1) // BLOCK
        assert room == tail or (tokens + room) % BLOCK == 0  # no less than can be
        size = min(step, room, CONTEXT - 1 - tokens)
        before = [run.positions(layer, head) for layer in range(3) for head in range(2)]
        if size:
            run.verify([2] * size)
        assert [run.positions(layer, head) for layer in range(3) for head in range(2)] == before
        run.commit(range(size))
        tokens += size


def test_a_ring_has_room_for_a_chunk(tiny: Callable[..., Tiny]) -> None:
    run = tiny("sliding").run("none", chunk=16)
    assert run.cache.room(0) == 16


def test_a_tree_of_one_token_is_a_step_like_any_other(tiny: Callable[..., Tiny]) -> None:
    """Steps of one token are repeated as they were recorded, which must not fix where the first one came."""
    chain, tree = (tiny("llama").run("none") for _ in range(2))
    assert torch.equal(chain.prefill([1, 2, 3]), tree.prefill([1, 2, 3]))
    for token in (4, 5, 6):
        assert torch.equal(chain.verify([token]), tree.verify([token], [-1]))
        chain.commit([0])
        tree.commit([0])
