"""What each method is for: each of these tests fails with another method in its place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.kv.driver import Layer, Tiny

from tightfit.errors import UsageError
from tightfit.kernels.codec import CODE_GROUP, PAGE
from tightfit.kv.base import BLOCK, LayerLayout

KV_HEADS, GROUPS, DIM, VALUES = 2, 2, 16, 40  # the second group of a value's channels is not full
HEADS = KV_HEADS * GROUPS
LAYOUT = LayerLayout(KV_HEADS, DIM, VALUES, 512, heads=HEADS)


def noise(count: int, seed: int = 0, scale: float = 0.1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of tokens that look at everything about alike."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(count, HEADS, DIM, generator=generator) * scale
    k = torch.randn(count, KV_HEADS, DIM, generator=generator) * scale
    return q, k, torch.randn(count, KV_HEADS, VALUES, generator=generator)


def unit(channel: int) -> torch.Tensor:
    return torch.eye(DIM)[channel]


# ---- window ----


def test_window_counts_positions_in_the_cache(tiny: Callable[..., Tiny]) -> None:
    """After the sinks, what lies further back than any layer reaches changes nothing, nor how long that was."""
    model, keep = tiny("llama"), 24
    sinks, end = model.tokens(4, seed=1), model.tokens(3 * keep, seed=2)
    found = {
        (positions, count): model.run(f"window(keep={keep},positions={positions})").prefill(
            sinks + model.tokens(count, seed=count) + end
        )
        for positions in ("cache", "original")
        for count in (40, 340)
    }
    torch.testing.assert_close(found["cache", 40], found["cache", 340], rtol=0, atol=2e-4)
    assert (found["original", 40] - found["original", 340]).abs().max() > 0.02  # the sinks are further away


def test_window_sees_its_sinks(tiny: Callable[..., Tiny]) -> None:
    model, rest = tiny("llama"), tiny("llama").tokens(150, seed=2)
    for sinks, differs in ((4, True), (0, False)):
        a, b = (model.run(f"window(keep=24,sinks={sinks})").prefill(model.tokens(4, seed) + rest) for seed in (5, 6))
        assert ((a - b).abs().max() > 0.02) == differs


@pytest.mark.parametrize("name", ["llama", "sliding"])
@pytest.mark.parametrize("positions", ["cache", "original"])
def test_window_is_exact_for_every_token_whatever_the_chunks(
    tiny: Callable[..., Tiny], name: str, positions: str
) -> None:
    model = tiny(name)
    tokens, kv = model.tokens(150), f"window(keep=30,positions={positions})"
    runs = {chunk: model.run(kv, chunk=chunk) for chunk in (1, 7, 48, 150)}
    found = [run.prefill(tokens) for run in runs.values()]
    found.append(model.run(kv, chunk=48).prefill(tokens, layered=True))
    decoding = model.run(kv)
    decoding.prefill(tokens[:40])
    found.append([decoding.decode(token) for token in tokens[40:]][-1])
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], rtol=0, atol=2e-4)
    for run in (*runs.values(), decoding):
        assert len(run.positions(1, 0)) < 30 + BLOCK


def test_a_window_no_smaller_than_the_models_own_changes_nothing_there(tiny: Callable[..., Tiny]) -> None:
    model = tiny("sliding")
    tokens = model.tokens(150)
    windows = [layer.attention.window for layer in model.spec.layers]
    assert windows == [40, None, 40]
    exact, wide = model.run("none").prefill(tokens), model.run("window(keep=150)").prefill(tokens)
    torch.testing.assert_close(exact, wide, rtol=0, atol=2e-4)


# ---- what scores tokens ----


def planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """300 tokens: the first 150 look at four of them (heavy hitters), the last 8 at another one."""
    q, k, v = noise(300)
    k[HEAVY] = 30 * unit(0)
    k[WANTED] = 30 * unit(1)
    q[:150] = unit(0)
    q[-8:] = unit(1)
    return q, k, v


HEAVY, WANTED = [11, 23, 37, 52], 200


@pytest.mark.parametrize("kv", ["h2o(keep=16,recent=0.75)", "d2o(keep=16,recent=0.75)"])
@pytest.mark.parametrize("chunk", [64, 300])
def test_heavy_hitters_stay_and_recent_tokens(kv: str, chunk: int) -> None:
    layer = Layer(kv, LAYOUT)
    q, k, v = planted()
    for a in range(0, 300, chunk):
        layer.add(q[a : a + chunk], k[a : a + chunk], v[a : a + chunk])
    for head in range(KV_HEADS):
        assert layer.positions(head) == [*HEAVY, *range(288, 300)]


def test_snapkv_keeps_what_the_last_queries_look_at_with_its_neighbours() -> None:
    layer = Layer("snapkv(keep=13,window=8,kernel=5)", LAYOUT)
    layer.add(*planted())
    for head in range(KV_HEADS):
        assert layer.positions(head) == [*range(WANTED - 2, WANTED + 3), *range(292, 300)]
    # In blocks of what is generated its own queries judge.
    q, k, v = noise(64)
    k[30], q[44:52] = 30 * unit(2), unit(2)  # positions 330, and 344 to 351
    layer.add(q, k, v, decode=True)
    assert 330 in layer.positions(0)
    assert WANTED not in layer.positions(0)


def test_h2o_with_normalize_divides_by_how_many_queries_could_see_a_token() -> None:
    """The mass of a token in the middle is less than that of one that was there for longer, though more per query."""
    q, k, v = noise(200)
    k[100] = 7 * unit(0)  # exp(7 / 4) times what others get, from queries that share among 100 to 200 tokens
    q[:] = unit(0)
    plain, normalized = (Layer(f"h2o(keep=2,recent=0,normalize={n})", LAYOUT) for n in ("false", "true"))
    for layer in (plain, normalized):
        layer.add(q, k, v)
    assert 100 in normalized.positions(0)
    assert 100 not in plain.positions(0)


def test_observed_attention_continues_over_evictions() -> None:
    """What was a heavy hitter long ago stays one for h2o; the last queries of snapkv forget it."""
    q, k, v = planted()
    for kv, stays in (("h2o(keep=24,recent=0.5)", True), ("snapkv(keep=24,window=8)", False)):
        layer = Layer(kv, LAYOUT)
        for a in range(0, 300, 50):
            layer.add(q[a : a + 50], k[a : a + 50], v[a : a + 50])
        layer.add(*noise(128, seed=3), decode=True)
        assert (set(HEAVY) <= set(layer.positions(0))) == stays


# ---- budgets ----


def test_pyramid_keeps_fewer_tokens_the_deeper_the_layer(tiny: Callable[..., Tiny]) -> None:
    run = tiny("llama").run("snapkv(keep=60,window=8,budget=pyramid)", context=1024)
    run.prefill(run.tiny.tokens(600))
    kept = [[len(run.positions(layer, head)) for head in range(2)] for layer in range(3)]
    assert all(a == b for a, b in kept)
    first, middle, last = (layer[0] for layer in kept)
    assert first > middle > last > 8
    assert first - middle == pytest.approx(middle - last, abs=1)
    assert first + middle + last == pytest.approx(3 * 60, abs=1)
    assert last - 8 == round((60 - 8) / 20)  # the paper's beta


def test_adakv_gives_tokens_to_the_heads_that_need_them() -> None:
    """One head looks at one token, the other at fifty."""
    q, k, v = noise(300)
    k[7, 0] = 60 * unit(0)
    k[100:150, 1] = 12 * unit(0)
    q[:] = 4 * unit(0)
    keep = 30
    adaptive, even = (Layer(f"snapkv(keep={keep},window=4,kernel=1,budget={b})", LAYOUT) for b in ("adakv", "uniform"))
    for layer in (adaptive, even):
        layer.add(q, k, v)
    assert [even.length(head) for head in range(2)] == [keep, keep]
    counts = [adaptive.length(head) for head in range(2)]
    assert sum(counts) == 2 * keep
    assert counts[1] > counts[0] >= 0.2 * keep  # the paper's safeguard
    assert 7 in adaptive.positions(0)
    assert counts[0] == pytest.approx(0.2 * keep, abs=1)
    assert set(adaptive.positions(1)) - set(range(296, 300)) <= set(range(100, 150))


# ---- codecs ----


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_have_their_bits_and_a_step_per_channel_of_keys_and_per_token_of_values(bits: int) -> None:
    layer, count, recent = Layer(f"int{bits}(recent=40)", LAYOUT), 200, 40
    q, k, v = noise(count, scale=1.0)
    k[:, :, 3] *= 1000  # a channel and a token that would ruin the others if they shared a scale
    v[50] *= 1000
    layer.add(q, k, v)
    coded = (count - recent) // PAGE * PAGE
    for head in range(KV_HEADS):
        keys, values = layer.read(head)
        assert torch.equal(keys[coded:], k[coded:, head])
        assert torch.equal(values[coded:], v[coded:, head])
        assert count - coded >= recent
        for page in range(0, coded, PAGE):
            check_codes(keys[page : page + PAGE], k[page : page + PAGE, head], 0, bits)
            for part in (slice(0, CODE_GROUP), slice(CODE_GROUP, VALUES)):
                check_codes(values[page : page + PAGE, part], v[page : page + PAGE, head, part], 1, bits)
    assert layer.pages.key_codec.page_bytes == -(-(PAGE * DIM * bits // 8 + 4 * DIM) // 64) * 64


def check_codes(found: torch.Tensor, exact: torch.Tensor, dim: int, bits: int) -> None:
    low, high = exact.amin(dim, keepdim=True), exact.amax(dim, keepdim=True)
    step = (high - low) / (2**bits - 1)
    half = 2**-11  # scales and minima are rounded to float16
    slack = half * (low.abs() + (high - low)) + 1e-6
    assert ((found - exact).abs() <= step / 2 + slack).all()
    for numbers in found.unbind(1 - dim):
        assert len(numbers.unique()) <= 2**bits
    assert ((found - exact).abs().amax(dim, keepdim=True) > step / 8).any()  # they are coded at all


def test_codecs_can_be_for_keys_or_values_alone() -> None:
    q, k, v = noise(200)
    for of, exact in (("keys", (False, True)), ("values", (True, False))):
        layer = Layer(f"int4(recent=0,of={of})", LAYOUT)
        layer.add(q, k, v)
        keys, values = layer.read(0)
        assert (torch.equal(keys, k[:, 0]), torch.equal(values, v[:, 0])) == exact


# ---- channels ----


def test_think_prunes_what_the_queries_do_not_need_however_large_the_keys_are() -> None:
    layer = Layer("think(prune=0.5,window=16,recent=40)", LAYOUT)
    q, k, v = noise(200, scale=1.0)
    k[:, :, 2] *= 10  # large keys that no query looks along
    q[:, :, 2] = 0.0
    k[:, :, 5] *= 0.3  # small keys that the last queries look along
    q[-16:, :, 5] = 50.0
    q[:-16, :, 7] = 50.0  # these queries came too early
    q[-16:, :, 7] = 0.0
    layer.add(q, k, v)
    assert layer.pages.channels is not None
    for head in range(KV_HEADS):
        channels = layer.pages.channels[0, head].tolist()
        assert channels == sorted(set(channels))
        assert len(channels) == DIM // 2
        assert 5 in channels
        assert 2 not in channels
        assert 7 not in channels
        keys, values = layer.read(head)
        pruned = [channel for channel in range(DIM) if channel not in channels]
        coded = (200 - 40) // PAGE * PAGE
        assert (keys[:coded, pruned] == 0).all()
        assert torch.equal(keys[:coded, channels], k[:coded, head][:, channels])
        assert torch.equal(keys[coded:], k[coded:, head])
        assert torch.equal(values, v[:, head])


# ---- pages that are read ----


def test_quest_reads_so_many_pages_and_the_one_that_matters() -> None:
    """Pages that are not chosen are made unreadable."""
    layer = Layer("quest(tokens=64,full=0)", LAYOUT)
    q, k, v = noise(300)
    k[70] = 20 * unit(0)  # in page 2
    layer.add(q, k, v)
    keys, numbers = layer.pages.keys, layer.pages.table
    hidden = []
    for head in range(KV_HEADS):
        bounds = [(k[a : a + PAGE, head].amin(0), k[a : a + PAGE, head].amax(0)) for a in range(0, 288, PAGE)]
        query = unit(0) + 0.01 * torch.arange(DIM)
        worth = torch.stack([torch.maximum(query * low, query * high).sum() for low, high in bounds])
        best = worth.topk(2).indices.tolist()
        assert 2 in best
        hidden.append([page for page in range(9) if page not in best])
        for page in hidden[head]:
            keys[0, int(numbers[0, head, page])] = torch.nan
    out = layer.add((unit(0) + 0.01 * torch.arange(DIM)).expand(1, HEADS, DIM).contiguous(), *noise(1)[1:], decode=True)
    assert out.isfinite().all()
    assert [len(pages) for pages in hidden] == [7, 7]
    assert (out[0, :GROUPS] - v[70, 0]).abs().max() < 0.5 * v[70, 0].abs().max()  # it looks at that token above all


def test_quest_is_exact_when_everything_fits(tiny: Callable[..., Tiny]) -> None:
    model = tiny("llama")
    prompt = model.tokens(150)
    for beside in ("int8", "snapkv(keep=100,window=8)"):
        with_quest, without = (model.run(kv) for kv in (f"{beside}+quest(tokens=512,full=0)", beside))
        first = with_quest.prefill(prompt)
        assert torch.equal(first, without.prefill(prompt))
        for a, b in zip(with_quest.generate(first, 40)[1], without.generate(first, 40)[1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_quest_leaves_prompts_and_the_first_layers_alone(tiny: Callable[..., Tiny]) -> None:
    model = tiny("llama")
    prompt = model.tokens(150)
    exact, selected = model.run("none"), model.run("quest(tokens=32,full=0)")
    torch.testing.assert_close(exact.prefill(prompt), selected.prefill(prompt), rtol=0, atol=2e-4)
    full = model.run("quest(tokens=32,full=3)")
    full.prefill(prompt)
    a, b, c = (run.decode(1) for run in (exact, full, selected))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-4)
    assert (a - c).abs().max() > 0.02


# ---- tiers ----


@pytest.mark.parametrize("name", ["llama", "sliding", "latent"])
@pytest.mark.parametrize("beside", ["", "int4(recent=32)+", "h2o(keep=100)+"])
def test_host_changes_nothing_and_takes_less_memory(tiny: Callable[..., Tiny], name: str, beside: str) -> None:
    model = tiny(name)
    alone = beside.removesuffix("+") or "h2o(keep=512)"  # which keeps all
    inside, outside = (model.run(kv) for kv in (alone, f"{beside}host(resident=0)"))
    allowed = 0.0 if "int4" in beside else 2e-4  # whole pages in memory are summed up several at once
    first, same = (run.prefill(model.tokens(150)) for run in (inside, outside))
    torch.testing.assert_close(first, same, rtol=0, atol=allowed)
    a, b = inside.generate(first, 72), outside.generate(same, 72)
    assert a[0] == b[0]
    for x, y in zip(a[1], b[1], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=allowed)
    assert outside.arena.used < inside.arena.used
    outside.cache.close()


def test_host_holds_what_it_says_in_memory(tiny: Callable[..., Tiny]) -> None:
    run = tiny("llama").run("host(resident=64)", context=2048)
    run.prefill(run.tiny.tokens(1000))
    for pages in run.paged.layers:
        used = (-(-pages.lengths[0] // PAGE)).tolist()
        in_file = pages.cold[0].tolist()
        assert [total - cold for total, cold in zip(used, in_file, strict=True)] == [2, 2]
    exact = tiny("llama").run("none", context=2048)
    assert run.arena.used < exact.arena.used / 6
    assert os.fstat(run.paged.store.file).st_size > 0.8 * exact.arena.used * 1000 / 2048


def test_the_file_of_host_has_no_name_and_goes_with_the_cache(tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    run = tiny("llama").run(f"host(resident=0,folder={tmp_path})")
    file = run.paged.store.file
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(file).st_nlink == 0
    assert os.readlink(f"/proc/self/fd/{file}").startswith(str(tmp_path))
    run.cache.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_host_refuses_a_folder_in_memory_or_that_is_not_there(tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tmpfs"):
        tiny("llama").run("host(folder=/dev/shm)")
    with pytest.raises(UsageError, match="cannot hold a cache"):
        tiny("llama").run(f"host(folder={tmp_path}/none)")
