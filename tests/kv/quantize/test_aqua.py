"""What the layer before says of a layer's keys and values costs no bits, and is read as it was coded against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from tests.kv.driver import ROOM, Tiny

from tightfit.budget.ledger import Arena, Workspace
from tightfit.errors import UsageError
from tightfit.kernels import pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.codec import PAGE, Codec
from tightfit.kernels.pages_reference import decode, encode
from tightfit.kv.base import LayerLayout, Rotation, Turn
from tightfit.kv.compose import compose
from tightfit.kv.fitted import Known, Sample
from tightfit.kv.make import kv_nbytes
from tightfit.kv.paged import PagedCache
from tightfit.kv.predicted import PredictedStore
from tightfit.kv.quantize.aqua import Aqua, pages_of
from tightfit.kv.quantize.rounding import rounded
from tightfit.model.batch import Batch, Segment

LAYERS, HEADS, DIM, KEEP = 16, 2, 16, 32
FREQUENCIES = tuple((0.3 ** torch.arange(DIM // 2)).tolist())
LAYOUT = LayerLayout(HEADS, DIM, DIM, 1024, heads=HEADS, rotation=Rotation(FREQUENCIES))
Layers = list[tuple[torch.Tensor, torch.Tensor]]


def tokens(count: int, strength: float, seed: int) -> Layers:
    """Of each layer keys (n, heads, dim), not turned, and values: a share ``strength`` of the variance of keys comes
    from those of the layer before, and of values from these keys and the values of the layer before."""
    by, rng = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    width, found = HEADS * DIM, Layers()
    k, v = torch.randn(2, count, width, generator=rng)
    for _ in range(LAYERS):
        found.append((k.view(-1, HEADS, DIM), v.view(-1, HEADS, DIM)))
        a, b, c = (torch.linalg.qr(torch.randn(width, width, generator=by))[0] for _ in range(3))
        new_k, new_v = torch.randn(2, count, width, generator=rng) * (1 - strength) ** 0.5
        k = strength**0.5 * k @ a + new_k
        v = (strength / 2) ** 0.5 * (k @ b + v @ c) + new_v
    return found


@cache
def known(strength: float, method: Aqua) -> Known:
    """What a text of such tokens says."""
    tensors, before = {}, None
    for layer, (k, v) in enumerate(tokens(1024, strength, seed=1)):
        of_layer = method if layer else replace(method, bits=method.first)
        before = of_layer.coded(pages_of([k], 0), pages_of([v], 0), before)
        for name, linear in (("keys", before.key_map), ("values", before.value_map)):
            if linear is not None:
                tensors |= {f"{name}.{layer}": linear.matrix, f"{name}.offset.{layer}": linear.offset}
    return Known(tensors={"aqua": tensors})


class Cached:
    """A cache of such tokens, which are given ``chunk`` at a time."""

    def __init__(self, kv: str, known: Known, given: Layers, chunk: int = 96) -> None:
        self.ws = Workspace(Arena(ROOM))
        layouts = [LAYOUT] * len(given)
        self.cache = PagedCache(layouts, compose(kv), 512, 1, torch.float32, Arena(ROOM), known=known)
        count = len(given[0][0])
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            positions = torch.arange(count)[part, None] * torch.tensor(FREQUENCIES)
            turn = Turn((positions.cos(), positions.sin()), False)
            batch = Batch((Segment(0, start, [0] * len(positions)),))
            self.cache.begin(0, start)
            for layer, (k, v) in enumerate(given):
                q, out = torch.randn(len(positions), HEADS, DIM), torch.empty(len(positions), HEADS, DIM)
                with self.ws.frame():
                    held = self.cache.update(layer, batch, q, k[part].clone(), v[part].clone(), turn, self.ws)
                    self.cache.attend_step(layer, batch, held, q, out, self.ws, Scoring(1.0))
            self.cache.prefilled(0, start, part.stop)

    def stores(self) -> list[PredictedStore]:
        found = [store for store in self.cache.store.lower if isinstance(store, PredictedStore)]
        assert len(found) == len(self.cache.layouts)
        return found

    def read(self, layer: int) -> list[torch.Tensor]:
        """Keys (n, heads, dim), turned, and values of tokens that were coded, as attention sees them."""
        kept = self.cache.layers[layer]
        if self.cache.store.lower[layer] is not None:
            self.stores()[layer].reach(0, self.ws)
            kept = self.stores()[layer].looked_at
        nothing = pages.Run(*torch.empty(2, HEADS, 1, DIM), 0)
        with self.ws.frame():
            heads = [
                [x.clone() for x in pages.read(kept, 0, head, nothing, 0, int(kept.lengths[0, head]), self.ws)]
                for head in range(HEADS)
            ]
        return [torch.stack(each, 1) for each in zip(*heads, strict=True)]


def turned(k: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(len(k))[:, None] * torch.tensor(FREQUENCIES)
    return Sample(k, k, k, Turn((positions.cos(), positions.sin()), False)).turned()[1]


def errors(kv: str, strength: float) -> tuple[float, float]:
    """The mean squares of what is missed of keys and of values, of which 1 is all: in all layers but the first."""
    given, method = tokens(320, strength, seed=2), compose(kv).methods[0]
    found = known(strength, method) if isinstance(method, Aqua) else Known()
    cached = Cached(kv, found, given)
    sums = torch.zeros(2)
    for layer in range(1, LAYERS):
        k, v = given[layer]
        first = method.sinks if isinstance(method, Aqua) else 0
        for kind, (back, x) in enumerate(zip(cached.read(layer), (turned(k), v), strict=True)):
            coded = x[first : first + len(back)]
            sums[kind] += (back[:256] - coded[:256]).square().mean() / coded[:256].square().mean()
    missed = sums / (LAYERS - 1)
    return float(missed[0]), float(missed[1])


MAPS = (("keys", 1), ("values", 2))  # and by how many times the features of a layer each is predicted
AQUA, INT2, INT4 = f"aqua(keep={KEEP},bits=2)", f"int2(recent={KEEP})", f"int4(recent={KEEP})"


def test_with_fewer_bytes_than_four_bits_it_misses_less() -> None:
    """Maps and the room for a layer are counted; this far apart four bits are from two by a factor of 25."""
    layouts = [LAYOUT] * LAYERS
    ours, theirs = (
        kv_nbytes(kv, layouts, 8192, 1, "bfloat16", known(0.99, Aqua(keep=KEEP)) if kv == AQUA else Known())
        for kv in (AQUA, INT4)
    )
    assert ours < theirs
    for mine, direct in zip(errors(AQUA, 0.99), errors(INT4, 0.99), strict=True):
        assert mine < 0.7 * direct


def test_it_is_what_layers_say_of_each_other_that_is_won() -> None:
    for mine, direct in zip(errors(AQUA, 0.0), errors(INT2, 0.0), strict=True):
        assert mine > 0.95 * direct
    for mine, direct in zip(errors(AQUA, 0.9), errors(INT2, 0.9), strict=True):
        assert mine < 0.3 * direct


def test_what_is_read_is_what_was_coded_against() -> None:
    """The last layer's numbers as they lay there when they were coded, and made again of all layers' codes."""
    given = tokens(320, 0.9, seed=3)
    cached = Cached(AQUA, known(0.9, Aqua(keep=KEEP)), given)
    chain, last = cached.stores()[0].chain, LAYERS - 1
    assert chain.at == [last]
    first = cached.read(last)
    cached.stores()[0].reach(0, cached.ws)
    assert chain.at == [0]
    assert not torch.equal(cached.read(0)[1], first[1])
    for again, x in zip(cached.read(last), first, strict=True):
        assert torch.equal(again, x)


def test_codes_are_the_same_however_tokens_come() -> None:
    given, found = tokens(320, 0.9, seed=3), known(0.9, Aqua(keep=KEEP))
    codes = [
        [
            (store.pages.coded_keys[0, numbers], store.pages.coded_values[0, numbers])
            for store in Cached(AQUA, found, given, chunk).stores()
            if store.pages.coded_keys is not None and store.pages.coded_values is not None
            for numbers in (store.pages.table[0, :, : int(store.pages.lengths[0, 0]) // PAGE].long(),)
        ]
        for chunk in (320, 50)
    ]
    for of_one, of_other in zip(*codes, strict=True):
        for a, b in zip(of_one, of_other, strict=True):
            assert a.numel() > 0
            assert torch.equal(a, b)


@pytest.mark.parametrize("layered", [False, True])
def test_first_and_last_tokens_are_exact_and_pages_between_are_coded(tiny: Callable[..., Tiny], layered: bool) -> None:
    small = tiny("llama")
    kv = "aqua(keep=40,sinks=4,bits=8,first=8)"
    run, full = (small.run(each, context=256, known=small.known(kv)) for each in (kv, "none"))
    given = small.tokens(180)
    found, wanted = (each.prefill(given[:140], layered=layered) for each in (run, full))
    for count in range(140, 180):
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.03 * float(wanted.abs().max()))
        last = max(count // PAGE * PAGE, 140)  # when tokens were coded last
        coded = (last - 40) // PAGE * PAGE
        for layer, lower in enumerate(run.paged.store.lower):
            assert lower is not None
            assert lower.pages.lengths.tolist() == [[coded, coded]]
            assert run.positions(layer, 0) == [*range(4), *range(4 + coded, count)]
        found, wanted = run.decode(given[count]), full.decode(given[count])


def test_every_layer_more_takes_its_codes_and_maps() -> None:
    context, width = 8192, HEADS * DIM
    sizes = []
    for layers in (2, 3, 4):
        maps = {
            f"{kind}.{layer}": torch.zeros(width, each * width) for layer in range(1, layers) for kind, each in MAPS
        }
        offsets = {f"{kind}.offset.{layer}": torch.zeros(width) for layer in range(1, layers) for kind, _ in MAPS}
        found = Known(tensors={"aqua": maps | offsets})
        sizes.append(kv_nbytes(AQUA, [LAYOUT] * layers, context, 1, "bfloat16", found))
    # Each number is 2 bits; a channel of a page of keys, and a token's 16 channels of a value, have 4 bytes more.
    codes = context * HEADS * (2 * DIM * 2 / 8 + 4 * DIM / PAGE + 4)
    of_maps = 2 * 3 * width * width + 4 * 2 * width
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0]
    assert sizes[1] - sizes[0] == pytest.approx(codes + of_maps, rel=0.1)  # what stays as it is, and where pages are
    room = context * HEADS * 2 * DIM * 2  # of one layer, and codes of twice as many bits in the first
    assert sizes[0] - 2 * (sizes[1] - sizes[0]) == pytest.approx(room + context * HEADS * 2 * DIM * 2 / 8, rel=0.1)


@pytest.mark.parametrize("per_channel", [False, True])
def test_maps_are_found_for_numbers_as_they_are_stored(per_channel: bool) -> None:
    codec, x = Codec(4, 40, per_channel), torch.randn(2 * PAGE, 1, 40, generator=torch.Generator().manual_seed(0))
    stored = [decode(codec, torch.float32, encode(codec, torch.float32, page)) for page in x[:, 0].split(PAGE)]
    assert torch.equal(rounded(x, codec)[:, 0], torch.cat(stored))


def test_where_layers_cannot_be_predicted_it_is_refused(tiny: Callable[..., Tiny]) -> None:
    for kv in ("aqua(bits=3)", "aqua(keep=4)", "aqua(keep=0.5)", "aqua+quest", "aqua+gqa", "aqua+think", "aqua+h2o"):
        with pytest.raises(UsageError):
            compose(kv)
    for layouts in (
        [replace(LAYOUT, window=40)],
        [replace(LAYOUT, shared=True)],
        [replace(LAYOUT, rotation=None)],
        [LAYOUT, replace(LAYOUT, kv_heads=1)],
    ):
        with pytest.raises(UsageError):
            PagedCache(layouts, compose(AQUA), 256, 1, torch.float32, Arena(ROOM), known=Known(tensors={"aqua": {}}))
    with pytest.raises(UsageError):
        tiny("sliding").findings("aqua")
