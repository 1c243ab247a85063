"""Attention over a cache is the softmax written out, on every instruction set, and a token's bits depend on nothing but
its query and the keys that it sees."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import attention, cpu, ops, reference
from tightfit.kernels.attention import KeysValues, Scoring

LEVELS = [level for level in cpu.supported() if not level.endswith("vnni")]  # these have no attention of their own
COMPILED = LEVELS[:-1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
levels = pytest.mark.parametrize("level", LEVELS)
compiled = pytest.mark.parametrize("level", COMPILED)


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    torch.manual_seed(0)
    chosen, threads = cpu.features()["chosen"], cpu.threads()
    yield
    cpu.use(chosen)
    cpu.set_threads(threads)


def scratch() -> Workspace:
    return Workspace(Arena(64 << 20))


def make_cache(
    kv_heads: int,
    slots: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    shared: bool = False,
    sequences: int = 2,
) -> KeysValues:
    keys = torch.randn(sequences, kv_heads, slots, key_dim).to(dtype)
    values = keys[..., :value_dim] if shared else torch.randn(sequences, kv_heads, slots, value_dim).to(dtype)
    return KeysValues(keys, values)


@dataclass(frozen=True)
class Case:
    """Tokens at ``start`` onwards of a sequence whose keys lie in a cache that is just large enough."""

    kv_heads: int
    groups: int
    key_dim: int
    value_dim: int
    shared: bool
    dtype: torch.dtype
    start: int
    n: int
    window: int | None
    softcap: float | None
    sinks: bool

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups

    @property
    def stop(self) -> int:
        return self.start + self.n

    def slots(self) -> int:
        return self.stop if self.window is None else min(self.stop, self.window - 1 + self.n)

    def scoring(self) -> Scoring:
        sinks = torch.randn(self.heads) if self.sinks else None
        return Scoring(1 / math.sqrt(self.key_dim), self.window, self.softcap, sinks)

    def queries(self) -> torch.Tensor:
        """With gaps between tokens and between heads, as parts of larger tensors have."""
        return torch.randn(self.n, self.heads, self.key_dim + 3)[..., : self.key_dim]

    def out(self) -> torch.Tensor:
        return torch.full((self.n, self.heads, self.value_dim + 1), math.nan)[..., : self.value_dim]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    key_dim = draw(st.sampled_from([1, 7, 16, 33, 64, 72, 96, 130]))
    shared = draw(st.booleans())
    return Case(
        kv_heads=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 20)),
        key_dim=key_dim,
        value_dim=draw(st.integers(1, key_dim)) if shared else draw(st.sampled_from([1, 9, 16, 40, 64])),
        shared=shared,
        dtype=draw(st.sampled_from(DTYPES)),
        start=draw(st.integers(0, 600)),
        n=draw(st.integers(1, 40)),
        window=draw(st.none() | st.integers(1, 300)),
        softcap=draw(st.none() | st.just(2.0)),
        sinks=draw(st.booleans()),
    )


def plain(q: torch.Tensor, cache: KeysValues, sequence: int, start: int, scoring: Scoring) -> torch.Tensor:
    """The definition in float64."""
    scale, window, softcap, sinks = scoring
    slots = cache.keys.shape[2]
    stop = start + q.shape[0]
    positions = torch.arange(max(0, stop - slots), stop)
    groups = q.shape[1] // cache.keys.shape[1]
    keys, values = (
        tensor[sequence][:, positions % slots].double().repeat_interleave(groups, 0)
        for tensor in (cache.keys, cache.values)
    )
    scores = torch.einsum("nhd,hpd->hnp", q.double(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    queries = torch.arange(start, stop).unsqueeze(1)
    hidden = positions > queries
    if window is not None:
        hidden |= positions <= queries - window
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, q.shape[0], 1)], -1)
    return torch.einsum("hnp,hpd->nhd", scores.softmax(-1)[..., : len(positions)], values)


def places_of(sequence: int, start: int, n: int) -> torch.Tensor:
    return torch.tensor([[sequence, start + i] for i in range(n)], dtype=torch.int32)


@levels
@settings(max_examples=25, deadline=None)
@given(case=cases(), threads=st.integers(1, 3))
def test_attention_is_the_softmax_written_out(level: str, case: Case, threads: int) -> None:
    cpu.use(level)
    cpu.set_threads(threads)
    cache = make_cache(case.kv_heads, case.slots(), case.key_dim, case.value_dim, case.dtype, case.shared)
    q, scoring = case.queries(), case.scoring()
    expected = plain(q, cache, 1, case.start, scoring)
    # Float32 against float64, for values of up to 5.
    together, rows = case.out(), case.out()
    attention.attend(cache, 1, case.start, q, together, scratch(), scoring)
    torch.testing.assert_close(together.double(), expected, rtol=0, atol=2e-5)
    attention.attend_rows(cache, places_of(1, case.start, case.n), q, rows, scratch(), scoring)
    torch.testing.assert_close(rows.double(), expected, rtol=0, atol=2e-5)


@levels
@settings(max_examples=25, deadline=None)
@given(case=cases(), threads=st.integers(1, 3))
def test_bfloat16_products_round_queries_keys_weights_and_values_only(level: str, case: Case, threads: int) -> None:
    cpu.use(level)
    cpu.set_threads(threads)
    cache = make_cache(case.kv_heads, case.slots(), case.key_dim, case.value_dim, case.dtype, case.shared)
    q, scoring = case.queries(), case.scoring()
    out = case.out()
    attention.attend(cache, 1, case.start, q, out, scratch(), scoring, bf16=True)
    if level == "amx":
        factor = scoring.scale * math.log2(math.e)  # what queries are multiplied by before they are rounded
        q = (q * factor).bfloat16().float() / factor
        keys = cache.keys.bfloat16().float()
        values = keys[..., : case.value_dim] if case.shared else cache.values.bfloat16().float()
        cache = KeysValues(keys, values)
    expected = plain(q, cache, 1, case.start, scoring)
    # Weights that add up to 1 are rounded by up to 2**-9, of values up to 5; rounding is the only error elsewhere.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5 * 2**-9 if level == "amx" else 2e-5)


@levels
@pytest.mark.parametrize("bf16", [False, True])
def test_scores_far_apart_do_not_overflow(level: str, bf16: bool) -> None:
    """Scores up to a thousand apart, as attention sinks have: weights are 0 or 1, never NaN."""
    cpu.use(level)
    n = 200
    cache = make_cache(1, n, 8, 8, torch.bfloat16)
    cache.keys[0, 0] = torch.linspace(-16, 16, n).view(n, 1).expand(n, 8)
    q, out = torch.full((n, 2, 8), 4.0), torch.empty(n, 2, 8)
    attention.attend(cache, 0, 0, q, out, scratch(), Scoring(1.0), bf16)
    chosen = plain(q, cache, 0, 0, Scoring(1.0)).float()
    torch.testing.assert_close(out, chosen, rtol=0, atol=5 * 2**-8 if bf16 else 1e-5)
    attention.attend_rows(cache, places_of(0, 0, n), q, out, scratch(), Scoring(1.0))
    torch.testing.assert_close(out, chosen, rtol=0, atol=1e-5)


@levels
def test_scores_of_any_size_give_the_mean_of_equals(level: str) -> None:
    cpu.use(level)
    cache = make_cache(1, 130, 4, 4, torch.float32)
    for score in (-1e37, -1e20, 0.0, 1e20, 1e37):
        cache.keys.fill_(score)
        q, out = torch.tensor([1.0, 0, 0, 0]).expand(130, 1, 4).contiguous(), torch.empty(130, 1, 4)
        attention.attend(cache, 0, 0, q, out, scratch(), Scoring(1.0))
        means = cache.values[0, 0].cumsum(0) / torch.arange(1, 131).view(-1, 1)
        torch.testing.assert_close(out[:, 0], means, rtol=0, atol=1e-5)


@levels
def test_a_key_that_is_not_a_number_reaches_those_that_see_it(level: str) -> None:
    cpu.use(level)
    cache = make_cache(1, 60, 8, 8, torch.float32)
    cache.keys[0, 0, 40, 3] = math.nan
    q, out = torch.randn(60, 1, 8), torch.empty(60, 1, 8)
    attention.attend_rows(cache, places_of(0, 0, 60), q, out, scratch(), Scoring(1.0))
    assert out[:40].isfinite().all()
    assert out[40:].isnan().all()


@compiled
@settings(max_examples=20, deadline=None)
@given(case=cases(), bf16=st.booleans(), data=st.data())
def test_bits_depend_on_the_query_and_what_it_sees_only(
    level: str, case: Case, bf16: bool, data: st.DataObject
) -> None:
    """Not on the other queries of the call, on threads, or on whether a ring or everything is kept."""
    cpu.use(level)
    whole = make_cache(case.kv_heads, case.stop, case.key_dim, case.value_dim, case.dtype, case.shared)
    size = case.slots()
    kept = torch.arange(case.stop - size, case.stop)
    ring_keys = torch.empty_like(whole.keys[:, :, :size])
    ring_keys[:, :, kept % size] = whole.keys[:, :, kept]
    ring_values = ring_keys[..., : case.value_dim]
    if not case.shared:
        ring_values = torch.empty_like(whole.values[:, :, :size])
        ring_values[:, :, kept % size] = whole.values[:, :, kept]
    ring = KeysValues(ring_keys, ring_values)
    q, scoring, places = case.queries(), case.scoring(), places_of(1, case.start, case.n)

    cpu.set_threads(1)
    together, rows = case.out(), case.out()
    attention.attend(whole, 1, case.start, q, together, scratch(), scoring, bf16)
    attention.attend_rows(whole, places, q, rows, scratch(), scoring)
    cpu.set_threads(3)
    for cache in (whole, ring):
        cut = data.draw(st.integers(0, case.n - 1))
        for a, b in ((0, cut), (cut, case.n)):
            if a == b:
                continue
            out = case.out()[a:b]
            if cache is whole or case.window is None:
                attention.attend(cache, 1, case.start + a, q[a:b], out, scratch(), scoring, bf16)
                assert torch.equal(out, together[a:b])
            attention.attend_rows(cache, places[a:b], q[a:b], out, scratch(), scoring)
            assert torch.equal(out, rows[a:b])
        out = case.out()
        attention.attend(cache, 1, case.start, q, out, scratch(), scoring, bf16)
        assert torch.equal(out, together)


@compiled
def test_rows_of_many_sequences_have_the_bits_that_each_has_alone(level: str) -> None:
    """More rows and longer contexts than are computed at once."""
    cpu.use(level)
    cache = make_cache(2, 5000, 64, 256, torch.bfloat16, sequences=4)
    places = torch.tensor([[s, p] for p in (0, 255, 256, 3000, 4999) for s in range(4)], dtype=torch.int32)
    q, together = torch.randn(20, 16, 64), torch.empty(20, 16, 256)
    attention.attend_rows(cache, places, q, together, scratch(), Scoring(0.1))
    for row in range(20):
        alone = torch.empty(1, 16, 256)
        attention.attend_rows(cache, places[row : row + 1], q[row : row + 1], alone, scratch(), Scoring(0.1))
        assert torch.equal(alone[0], together[row])
    first = cache.values[:, :, 0].float().repeat_interleave(8, 1)
    assert torch.equal(together[:4], first)  # the first token sees its own value only


SPECIAL = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 65504.0, 65519.0, 65520.0, -1e30, 3.4e38, 1e-5, 6e-8]
SPECIAL += [2.0**-25, 1.5 * 2**-25, 1e-40, math.inf, -math.inf, math.nan]


@levels
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 12),
    kv_heads=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    slots=st.integers(12, 20),
    start=st.integers(0, 50),
)
def test_what_is_appended_is_what_torch_rounds_it_to(
    level: str, dtype: torch.dtype, tokens: int, kv_heads: int, dims: tuple[int, int], slots: int, start: int
) -> None:
    cpu.use(level)
    cache = make_cache(kv_heads, slots, *dims, dtype)
    keys, values = cache.keys.clone(), cache.values.clone()
    both = torch.randn(tokens, 2, kv_heads, 40) * torch.tensor(10.0) ** torch.randint(-7, 6, (tokens, 2, kv_heads, 40))
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), both.shape)]
    both = torch.where(torch.rand(both.shape) < 0.3, special, both)
    k, v = both[:, 0, :, : dims[0]], both[:, 1, :, : dims[1]]
    attention.append(cache, places_of(1, start, tokens), k, v)
    where = torch.arange(start, start + tokens) % slots
    keys[1][:, where], values[1][:, where] = k.transpose(0, 1).to(dtype), v.transpose(0, 1).to(dtype)
    torch.testing.assert_close(cache.keys, keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(cache.values, values, rtol=0, atol=0, equal_nan=True)


@levels
def test_a_latent_is_appended_once(level: str) -> None:
    cpu.use(level)
    cache = make_cache(1, 8, 6, 4, torch.bfloat16, shared=True)
    key = torch.randn(3, 1, 6)
    attention.append(cache, places_of(0, 6, 3), key, None)
    assert torch.equal(cache.keys[0, 0, [6, 7, 0]], key[:, 0].bfloat16())
    assert torch.equal(cache.values[0, 0, [6, 7, 0]], key[:, 0, :4].bfloat16())


@levels
@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 9),
    heads=st.integers(1, 5),
    half=st.integers(1, 40),
    rest=st.integers(0, 5),
    interleaved=st.booleans(),
)
def test_rotation_has_the_bits_of_the_reference(
    level: str, tokens: int, heads: int, half: int, rest: int, interleaved: bool
) -> None:
    cpu.use(level)
    angles = torch.randn(tokens, half)
    cos, sin = angles.cos(), angles.sin()
    x = torch.randn(tokens, heads, 7 + 2 * half + rest)
    expected = x.clone()
    reference.rotate_(expected[..., 7:], cos, sin, interleaved, *torch.empty(2, tokens, heads, half))
    attention.rotate_(x[..., 7:], cos, sin, interleaved, scratch())
    assert torch.equal(x, expected)


@levels
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotating_and_appending_at_once_is_doing_one_after_the_other(level: str, interleaved: bool) -> None:
    cpu.use(level)
    tokens, angles = 70, torch.randn(70, 5)
    tables = angles.cos(), angles.sin()
    whole = torch.randn(tokens, 8, 12)
    apart, at_once = (part.split([4, 2, 2], 1) for part in (whole.clone(), whole.clone()))
    one, other = make_cache(2, 70, 12, 12, torch.bfloat16), make_cache(2, 70, 12, 12, torch.bfloat16)
    places = places_of(1, 0, tokens)
    for tensor in apart[:2]:
        attention.rotate_(tensor, *tables, interleaved, scratch())
    attention.append(one, places, *apart[1:])
    attention.rotate_append(other, places, *at_once, *tables, interleaved, scratch())
    for a, b in zip(apart, at_once, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.keys[1], other.keys[1])
    assert torch.equal(one.values[1], other.values[1])


@levels
@settings(max_examples=20, deadline=None)
@given(case=cases(), bf16=st.booleans(), data=st.data())
def test_a_dry_run_at_the_end_of_the_context_foresees_the_scratch_of_every_step(
    level: str, case: Case, bf16: bool, data: st.DataObject
) -> None:
    cpu.use(level)
    cache = make_cache(case.kv_heads, case.slots(), case.key_dim, case.value_dim, case.dtype, case.shared)

    def used(start: int, n: int) -> list[int]:
        q, out, ws = case.queries()[:n], case.out()[:n], [scratch(), scratch()]
        attention.attend(cache, 1, start, q, out, ws[0], case.scoring(), bf16)
        attention.attend_rows(cache, places_of(1, start, n), q, out, ws[1], case.scoring())
        return [one.high_water for one in ws]

    with ops.dry():
        foreseen = used(case.start, case.n)
    start = data.draw(st.integers(0, case.start))
    n = data.draw(st.integers(1, case.n))
    for needed, expected in zip(used(start, n), foreseen, strict=True):
        assert needed <= expected
    if level in COMPILED:
        assert used(case.start, case.n) == foreseen


@levels
def test_scratch_does_not_grow_with_the_context(level: str) -> None:
    cpu.use(level)
    used = []
    for slots in (8192, 1 << 17):
        cache = KeysValues(torch.empty(1, 1, slots, 64), torch.empty(1, 1, slots, 64))
        q, out, ws = torch.empty(20, 8, 64), torch.empty(20, 8, 64), [scratch(), scratch()]
        with ops.dry():
            attention.attend(cache, 0, slots - 20, q, out, ws[0], Scoring(1.0), bf16=True)
            attention.attend_rows(cache, places_of(0, slots - 20, 20), q, out, ws[1], Scoring(1.0))
        used.append([one.high_water for one in ws])
    assert used[0] == used[1]


@levels
def test_asking_for_more_than_is_kept_is_refused(level: str) -> None:
    cpu.use(level)
    cache = make_cache(1, 10, 4, 4, torch.float32)
    q = torch.zeros(3, 1, 4)
    for start, scoring in ((8, Scoring(1.0)), (50, Scoring(1.0, window=9))):
        with pytest.raises(ValueError, match="attention over 11 tokens with a cache that keeps 10"):
            attention.attend(cache, 0, start, q, q, scratch(), scoring)
    with pytest.raises(ValueError, match="attention over 11 tokens with a cache that keeps 10"):
        attention.attend_rows(cache, places_of(0, 9, 2), q[:2], q[:2], scratch(), Scoring(1.0))
    attention.attend_rows(cache, places_of(0, 30, 2), q[:2], q[:2], scratch(), Scoring(1.0, window=10))


@compiled
def test_what_compiled_kernels_would_read_or_write_elsewhere_is_refused(level: str) -> None:
    cpu.use(level)
    cache = make_cache(1, 10, 4, 4, torch.float32)
    q, ws = torch.zeros(1, 2, 4), scratch()
    for places in ([[2, 0]], [[-1, 0]], [[0, -1]]):
        bad = torch.tensor(places, dtype=torch.int32)
        with pytest.raises(IndexError, match="place"):
            attention.attend_rows(cache, bad, q, q, ws, Scoring(1.0))
        with pytest.raises(IndexError, match="place"):
            attention.append(cache, bad, q[:, :1], q[:, :1])
    with pytest.raises(IndexError, match="sequence"):
        attention.attend(cache, 2, 0, q, q, ws, Scoring(1.0))
    good = places_of(0, 0, 1)
    for wrong in (q.half(), q[..., :3], q.expand(2, 2, 4), torch.zeros(1, 4, 2).transpose(1, 2)):
        with pytest.raises(ValueError, match="expected"):
            attention.attend_rows(cache, good, wrong, q, ws, Scoring(1.0))
    with pytest.raises(ValueError, match="expected"):
        attention.append(cache, good.long(), q[:, :1], q[:, :1])
    with pytest.raises(ValueError, match="expected"):
        attention.rotate_(q, torch.zeros(1, 3), torch.zeros(1, 3), False, ws)
