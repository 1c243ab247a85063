"""Pages of keys and values hold what was kept of which token, whatever was evicted, coded and moved to a file in
between, and attention over them is the softmax written out: on every instruction set, with the same bits whatever else
is computed."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import cpu, ops, pages, pages_reference
from tightfit.kernels.attention import Scoring
from tightfit.kernels.codec import PAGE, Codec
from tightfit.kernels.pages import Looking, Pages, Rows, Run

LEVELS = [level for level in cpu.supported() if not level.endswith("vnni")]  # these have no attention of their own
COMPILED = LEVELS[:-1]
levels = pytest.mark.parametrize("level", LEVELS)
compiled = pytest.mark.parametrize("level", COMPILED)
SEQUENCES = 2
TABLE_PAGES = 32
TAIL = 40  # tokens that may follow before the next are kept


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    chosen, threads = cpu.features()["chosen"], cpu.threads()
    yield
    cpu.use(chosen)
    cpu.set_threads(threads)


def scratch() -> Workspace:
    return Workspace(Arena(64 << 20))


# Codecs that have more than a scale and a minimum.
SCHEMES: dict[str, dict[str, int]] = {
    "plain": {},
    "token": {"group": 1 << 10, "affine": True},
    "residual": {"rank": 2, "outliers": 7, "affine": True},
    "coupled": {"coupled": 8},
}


def codec_of(scheme: str, bits: int, dim: int, per_channel: bool, wide: int) -> Codec:
    settings = SCHEMES[scheme] | ({"wide": wide} if scheme == "residual" else {})
    if bits >= 16 or scheme == "plain":
        return Codec(bits, dim, per_channel)
    if scheme == "coupled":
        settings = {"coupled": next(n for n in (8, 4, 2, 1) if dim % n == 0)}
    return Codec(bits, dim, per_channel, **settings)  # type: ignore[arg-type]


def table_of(codec: Codec, tables: int, kv_heads: int) -> torch.Tensor | None:
    side = torch.randn(tables, kv_heads, codec.side)
    if codec.affine:
        side[..., codec.dim : 2 * codec.dim] = side[..., codec.dim : 2 * codec.dim].abs() + 0.1
    return side if codec.side else None


@dataclass(frozen=True)
class Case:
    """A store of pages, and how queries look at it."""

    kv_heads: int = 2
    groups: int = 2
    key_dim: int = 40
    value_dim: int = 24
    shared: bool = False
    dtype: torch.dtype = torch.bfloat16
    pool: bool = False  # whether there are coded pages in memory
    key_bits: int = 16
    value_bits: int = 16
    scheme: str = "plain"
    channels: int | None = None  # how many of the keys' channels coded pages have
    file: bool = False
    positions: bool = False
    parts: int = 1  # of a page that have bounds
    unbounded: int = 0  # how many of the first heads have none
    recent: int = 0
    resident: int = pages.EVERYTHING
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    anchors: int = 0
    turned: bool = False  # whether anchors are seen by other queries
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups

    def codecs(self) -> tuple[Codec, Codec]:
        as_it_is = 8 * self.dtype.itemsize
        bits = [as_it_is if bits >= 16 else bits for bits in (self.key_bits, self.value_bits)]
        dims, wide = (self.channels or self.key_dim, self.value_dim), self.dtype.itemsize
        kinds = zip(bits, dims, (True, False), strict=True)
        keys, values = (codec_of(self.scheme, *kind, wide) for kind in kinds)
        return keys, values

    def scoring(self) -> Scoring:
        torch.manual_seed(self.seed)
        sinks = torch.randn(self.heads) if self.sinks else None
        return Scoring(1 / math.sqrt(self.key_dim), self.window, self.softcap, sinks)

    def looking(self, n: int, chosen: torch.Tensor | None = None) -> Looking:
        """Queries with gaps between tokens and between heads, as parts of larger tensors have."""
        q, anchor_q = torch.randn(2, n, self.heads, self.key_dim + 3)[..., : self.key_dim]
        return Looking(q, anchor_q if self.turned else None, self.anchors, chosen)

    def results(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.full((n, self.heads, self.value_dim + 1), math.nan)[..., : self.value_dim]
        return out, torch.full((n, self.heads + 1), math.nan)[:, : self.heads]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    key_dim = draw(st.sampled_from([1, 7, 33, 64, 72]))
    shared, pool, file = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    codes, kv_heads = pool or file, draw(st.integers(1, 3))
    return Case(
        kv_heads=kv_heads,
        groups=draw(st.integers(1, 4)),
        key_dim=key_dim,
        value_dim=draw(st.integers(1, key_dim)) if shared else draw(st.sampled_from([1, 9, 40, 64, 70])),
        shared=shared,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        pool=pool,
        key_bits=draw(st.sampled_from([2, 4, 8, 16])) if codes else 16,
        value_bits=draw(st.sampled_from([2, 4, 8, 16])) if codes else 16,
        scheme=draw(st.sampled_from(list(SCHEMES))),
        channels=draw(st.none() | st.integers(1, key_dim)) if codes and not shared else None,
        file=file,
        positions=draw(st.booleans()),
        parts=draw(st.sampled_from([1, 2, 4, 16])),
        unbounded=draw(st.integers(0, kv_heads - 1)),
        recent=draw(st.integers(0, 100)),
        resident=draw(st.integers(0, 6)) if file else pages.EVERYTHING,
        window=draw(st.none() | st.integers(1, 300)),
        softcap=draw(st.none() | st.just(2.0)),
        sinks=draw(st.booleans()),
        anchors=draw(st.sampled_from([0, 0, 4, 40])),
        turned=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 30)),
    )


@dataclass
class Tokens:
    """What the certain tokens of one head must hold, as it is multiplied; and how many pages are coded, and in the
    file."""

    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    coded: int = 0
    cold: int = 0

    def __len__(self) -> int:
        return len(self.k)


class Store:
    """Pages, and of each sequence and head the tokens that they must hold."""

    def __init__(self, case: Case, dense_pages: int | None = None) -> None:
        self.case, self.random = case, random.Random(case.seed)
        torch.manual_seed(case.seed)
        dense_pages = dense_pages or case.kv_heads * TABLE_PAGES
        coded_pages = case.kv_heads * TABLE_PAGES if case.pool else 0
        key_codec, value_codec = case.codecs()
        per_head = SEQUENCES, case.kv_heads
        bounds = SEQUENCES, case.kv_heads - case.unbounded, TABLE_PAGES, case.parts, 2, case.key_dim
        # What was never written must not be seen: it is no number.
        keys = torch.full((SEQUENCES, dense_pages, PAGE, case.key_dim), math.nan, dtype=case.dtype)
        values = torch.full((SEQUENCES, dense_pages, PAGE, case.value_dim), math.nan, dtype=case.dtype)
        channels = [torch.randperm(case.key_dim)[: key_codec.dim].sort().values for _ in range(math.prod(per_head))]
        self.file = tempfile.TemporaryFile() if case.file else None  # noqa: SIM115 (as long as the store)
        file_pages = math.prod(per_head) * TABLE_PAGES
        self.pages = Pages(
            keys=keys,
            values=keys[..., : case.value_dim] if case.shared else values,
            table=torch.empty(*per_head, TABLE_PAGES, dtype=torch.int32),
            lengths=torch.empty(per_head, dtype=torch.int32),
            coded=torch.empty(per_head, dtype=torch.int32),
            cold=torch.empty(per_head, dtype=torch.int32),
            bounded=torch.empty(per_head, dtype=torch.int32),
            dense_free=torch.empty(SEQUENCES, 1 + dense_pages, dtype=torch.int32),
            coded_free=torch.empty(SEQUENCES, 1 + coded_pages, dtype=torch.int32),
            tokens=torch.zeros(SEQUENCES, dtype=torch.int32),
            key_codec=key_codec,
            value_codec=value_codec,
            coded_keys=_bytes(SEQUENCES, coded_pages, key_codec.page_bytes) if case.pool else None,
            coded_values=_bytes(SEQUENCES, coded_pages, value_codec.page_bytes)
            if case.pool and not case.shared
            else None,
            positions=torch.zeros(*per_head, TABLE_PAGES * PAGE, dtype=torch.int32) if case.positions else None,
            channels=torch.stack(channels).view(*per_head, -1).int() if case.channels else None,
            bounds=torch.full(bounds, math.nan, dtype=case.dtype),
            bound_at=torch.arange(case.kv_heads).int() - case.unbounded if case.unbounded else None,
            file=self.file.fileno() if self.file else -1,
            keys_at=4096,
            values_at=4096 + file_pages * key_codec.page_bytes,
            key_side=table_of(key_codec, 1 if key_codec.coupled else SEQUENCES, case.kv_heads),
            value_side=table_of(value_codec, 1 if value_codec.coupled else SEQUENCES, case.kv_heads),
        )
        tables = [table.clone() for table in self.pages.tables]
        for sequence in range(SEQUENCES):
            self.pages.reset(sequence)
        for table, before in zip(self.pages.tables, tables, strict=True):
            table.copy_(before)
        nothing = torch.empty(0, case.key_dim), torch.empty(0, case.value_dim), torch.empty(0, dtype=torch.int32)
        self.held = [[Tokens(*nothing) for _ in range(case.kv_heads)] for _ in range(SEQUENCES)]

    def run(self, n: int) -> Run:
        """With slots to spare, as a prompt's chunk has that is not the longest."""
        keys = torch.randn(self.case.kv_heads, n + 3, self.case.key_dim).to(self.case.dtype)
        if self.case.shared:
            return Run(keys, keys[..., : self.case.value_dim], n)
        return Run(keys, torch.randn(self.case.kv_heads, n + 3, self.case.value_dim).to(self.case.dtype), n)

    def run_tokens(self, run: Run, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        return run.keys[head, : run.count].float(), run.values[head, : run.count].float()

    def keep(self, sequence: int, run: Run, kept: list[torch.Tensor] | None = None, tail: int = TAIL) -> None:
        """What :func:`pages.keep` does, and what must come of it; then checks that it did."""
        case, indices, counts = self.case, None, None
        if kept is not None:
            counts = torch.tensor([len(one) for one in kept], dtype=torch.int32)
            indices = torch.full((case.kv_heads, int(counts.max()) + 1), -1, dtype=torch.int32)
            for head, one in enumerate(kept):
                indices[head, : len(one)] = one
        pages.keep(self.pages, sequence, run, scratch(), indices, counts, case.recent, case.resident, tail)
        start = int(self.pages.tokens[sequence])
        self.pages.tokens[sequence] += run.count
        for head, tokens in enumerate(self.held[sequence]):
            k, v = self.run_tokens(run, head)
            positions = torch.arange(start, start + run.count, dtype=torch.int32)
            one = torch.arange(len(tokens) + run.count) if kept is None else kept[head]
            self.held[sequence][head] = self.outcome(sequence, head, tokens, Tokens(k, v, positions), one)
            if self.pages.positions is not None:
                self.pages.positions[sequence, head, : len(one)] = self.held[sequence][head].positions
        self.check(sequence, tail)

    def outcome(self, sequence: int, head: int, old: Tokens, new: Tokens, kept: torch.Tensor) -> Tokens:
        case = self.case
        k, v, positions = (
            torch.cat(both)[kept] for both in ((old.k, new.k), (old.v, new.v), (old.positions, new.positions))
        )
        same = next((i for i, index in enumerate(kept.tolist()) if i != index), len(kept))
        first = min(same, len(old)) // PAGE
        coded = max(len(kept) - case.recent, 0) // PAGE if case.pool else 0
        coded = max(coded, min(old.coded, first))
        cold = min(max(-(-len(kept) // PAGE) - case.resident, 0), coded if case.pool else len(kept) // PAGE)
        cold = max(cold if case.file else 0, min(old.cold, first))
        for j in range(max(coded, cold)):
            if j >= first or j >= max(old.coded, old.cold):
                page = slice(j * PAGE, (j + 1) * PAGE)
                k[page], v[page] = self.rounded(sequence, head, k[page], v[page])
        rest = max(coded, cold, first) * PAGE
        k[rest:], v[rest:] = k[rest:].to(case.dtype).float(), v[rest:].to(case.dtype).float()
        if case.shared:
            v = k[:, : case.value_dim]
        return Tokens(k, v, positions, coded, cold)

    def rounded(self, sequence: int, head: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a page of codes holds. What codes are is checked elsewhere."""
        (key_codec, value_codec), dtype = self.case.codecs(), self.case.dtype
        channels = torch.arange(self.case.key_dim)
        if self.pages.channels is not None:
            channels = self.pages.channels[sequence, head].long()
        key = torch.zeros_like(k)
        key_side, value_side = pages_reference._sides(self.pages, sequence, head)
        key[:, channels] = _coded(key_codec, dtype, k[:, channels], key_side)
        return key, v if self.case.shared else _coded(value_codec, dtype, v, value_side)

    def check(self, sequence: int, tail: int) -> None:
        """Every token holds what it must, and each page is either free or one head's, of which there are as many as are
        needed."""
        p, dense, in_pool = self.pages, list[int](), list[int]()
        for head, tokens in enumerate(self.held[sequence]):
            assert int(p.lengths[sequence, head]) == len(tokens)
            ws = scratch()
            k, v = pages.read(p, sequence, head, self.run(0), 0, len(tokens), ws)
            assert torch.equal(k, tokens.k)
            if self.case.shared:
                v = k[:, : self.case.value_dim]
            assert torch.equal(v, tokens.v)
            assert int(p.coded[sequence, head]) == tokens.coded
            assert int(p.cold[sequence, head]) == tokens.cold
            table = p.table[sequence, head].tolist()
            needed = -(-(len(tokens) + tail) // PAGE)
            assert all(page < 0 for page in table[: tokens.cold] + table[needed:])
            split = max(tokens.cold, tokens.coded)
            in_pool += table[tokens.cold : split]
            dense += table[split:needed]
            whole = len(tokens) // PAGE
            bounds, parts = p.bounds_of(sequence, head), self.case.parts
            if bounds is None:
                assert int(p.bounded[sequence, head]) == 0
                assert head < self.case.unbounded
                continue
            assert int(p.bounded[sequence, head]) == whole
            low, high = bounds[:whole].float().unbind(2)
            paged = tokens.k[: whole * PAGE].view(whole, parts, PAGE // parts, self.case.key_dim)
            assert (low <= paged.amin(2)).all()
            assert (high >= paged.amax(2)).all()
            # They are no wider than the type needs: bfloat16 has 8 bits.
            assert torch.allclose(low, paged.amin(2), rtol=2**-7, atol=1e-7)
            assert torch.allclose(high, paged.amax(2), rtol=2**-7, atol=1e-7)
        for used, free in ((dense, p.dense_free[sequence]), (in_pool, p.coded_free[sequence])):
            listed = free[1 : 1 + free[0]].tolist()
            assert sorted(used + listed) == list(range(len(free) - 1))

    def grow(self, sequence: int, most: int = 400) -> None:
        """Some chunks of a prompt, and some tokens that decode; each time heads may let go of what they choose."""
        for _ in range(self.random.randint(1, 4)):
            decodes = self.random.random() < 0.4 and len(self.held[sequence][0]) > 0
            run = self.run(0 if decodes else self.random.randint(1, 130))
            if decodes:
                self.decode(sequence, self.random.randint(1, TAIL))
            kept = None
            lengths = [len(tokens) for tokens in self.held[sequence]]
            if max(lengths) + run.count > most or self.random.random() < 0.7:
                kept = [self.some(length, run.count, most) for length in lengths]
            self.keep(sequence, run, kept)

    def some(self, length: int, new: int, most: int) -> torch.Tensor:
        """Some of ``length`` tokens in pages and ``new`` ones of a run. The new may come between the others, as
        far as none of these then stands further back than it was."""
        share, whole = self.random.random(), self.random.choice([0, 40, 100, length])  # the first stay, as sinks do
        picked = [i for i in range(length + new) if i < whole or self.random.random() < share]
        picked = picked[:most] or [length + new - 1]
        old, late = [i for i in picked if i < length], [i for i in picked if i >= length]
        if self.case.positions or self.random.random() < 0.7:  # positions ascend
            return torch.tensor(picked)
        woven: list[int] = []
        while old or late:
            room = min((index - place for place, index in enumerate(old, len(woven))), default=1)
            woven.append((late if late and room > 0 and (not old or self.random.random() < 0.4) else old).pop(0))
        return torch.tensor(woven)

    def append(self, sequence: int, n: int) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        """``n`` tokens behind the certain ones, and what they hold (kv_heads, n, dim)."""
        case = self.case
        k, v = torch.randn(n, case.kv_heads, case.key_dim), torch.randn(n, case.kv_heads, case.value_dim + 2)[..., 2:]
        start = int(self.pages.tokens[sequence])
        rows = Rows(torch.tensor([[sequence, start + i] for i in range(n)], dtype=torch.int32))
        pages.append(self.pages, rows, k, None if case.shared else v)
        k, v = (k if case.shared and x is v else x for x in (k, v))
        stored = [x.to(case.dtype).float().transpose(0, 1) for x in (k, v[..., : case.value_dim])]
        return rows, stored[0], stored[1]

    def commit(self, sequence: int, path: list[int], k: torch.Tensor, v: torch.Tensor) -> None:
        """The tokens that ``path`` names are certain now."""
        pages.straighten(self.pages, sequence, torch.tensor(path, dtype=torch.int32))
        start = int(self.pages.tokens[sequence])
        positions = torch.arange(start, start + len(path), dtype=torch.int32)
        for head, old in enumerate(self.held[sequence]):
            length = len(old)
            both = torch.cat([old.k, k[head, path]]), torch.cat([old.v, v[head, path]])
            together = torch.cat([old.positions, positions])
            self.held[sequence][head] = Tokens(*both, together, old.coded, old.cold)
            if self.pages.positions is not None:
                self.pages.positions[sequence, head, length : length + len(path)] = positions
        self.pages.lengths[sequence] += len(path)
        self.pages.tokens[sequence] += len(path)

    def decode(self, sequence: int, n: int) -> None:
        _, k, v = self.append(sequence, n)
        self.commit(sequence, sorted(self.random.sample(range(n), self.random.randint(1, n))), k, v)

    def expected(
        self,
        looking: Looking,
        row: int,
        sequence: int,
        head: int,
        behind: tuple[torch.Tensor, torch.Tensor],
        listed: torch.Tensor | None = None,
        since: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The definition in float64, of one row and key-value head that sees the certain tokens, or those ``listed`` of
        the ones before ``since`` (default: that are in whole pages), and those ``behind``, its own being the last: out
        (groups, value_dim), lse (groups), mass (tokens,)."""
        case, scoring, tokens = self.case, self.case.scoring(), self.held[sequence][head]
        own = int(self.pages.tokens[sequence]) + len(behind[0]) - 1
        positions = tokens.positions if case.positions else torch.arange(len(tokens))
        positions = torch.cat([positions, torch.arange(own - len(behind[0]) + 1, own + 1)])
        keys, values = torch.cat([tokens.k, behind[0]]).double(), torch.cat([tokens.v, behind[1]]).double()
        anchors = torch.arange(len(keys)) < looking.anchors
        seen = anchors | (positions > own - (scoring.window or math.inf))
        if listed is not None:
            anchors, seen = torch.zeros(2, len(keys), dtype=torch.bool)
            seen[listed], seen[len(tokens) // PAGE * PAGE if since is None else since :] = True, True
        heads = slice(head * case.groups, (head + 1) * case.groups)
        q = looking.q[row, heads].double()
        turned = q if looking.anchor_q is None else looking.anchor_q[row, heads].double()
        scores = torch.where(anchors, turned @ keys.T, q @ keys.T) * scoring.scale
        if scoring.softcap is not None:
            scores = scoring.softcap * (scores / scoring.softcap).tanh()
        scores = scores.masked_fill(~seen, -math.inf)
        sinks = torch.full((case.groups, 1), -math.inf, dtype=torch.double)
        if scoring.sinks is not None:
            sinks = scoring.sinks[heads].double().view(-1, 1)
        lse = torch.cat([scores, sinks], 1).logsumexp(1, keepdim=True)
        weights = (scores - lse).exp()
        return weights @ values, lse[:, 0] / math.log(2), weights.sum(0)


def _coded(codec: Codec, dtype: torch.dtype, numbers: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
    return pages_reference.decode(codec, dtype, pages_reference.encode(codec, dtype, numbers, side), side)


def _bytes(*shape: int) -> torch.Tensor:
    return torch.full(shape, 255, dtype=torch.uint8)


def copied(p: Pages) -> Pages:
    """Another store that holds the same; of the file only one is written to."""
    tensors = {f.name: getattr(p, f.name) for f in dataclasses.fields(p) if f.init}
    copies = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}
    if p.shared:
        copies["values"] = copies["keys"][..., : p.values.shape[3]]
    return Pages(**copies)


def together(*rows: Rows) -> Rows:
    return Rows(torch.cat([one.places for one in rows]))


# ---- codes ----


@given(bits=st.sampled_from([2, 4, 8]), dim=st.integers(1, 70), per_channel=st.booleans(), seed=st.integers(0, 1 << 30))
@settings(max_examples=30, deadline=None)
def test_codes_are_within_half_a_step(bits: int, dim: int, per_channel: bool, seed: int) -> None:
    torch.manual_seed(seed)
    codec = Codec(bits, dim, per_channel)
    numbers = torch.randn(PAGE, dim) * torch.rand(dim) * 10 + torch.randn(dim)
    page = pages_reference.encode(codec, torch.bfloat16, numbers)
    assert len(page) == codec.page_bytes
    decoded = pages_reference.decode(codec, torch.bfloat16, page)
    parts = [(numbers, decoded)] if per_channel else zip(numbers.split(32, 1), decoded.split(32, 1), strict=True)
    for before, after in parts:
        axis = 0 if per_channel else 1
        low, high = before.amin(axis, keepdim=True), before.amax(axis, keepdim=True)
        step = (high - low) / (2**bits - 1)
        # The minimum is rounded by 2**-11 of itself, and so is the step, which is taken up to 2**bits - 1 times.
        assert ((after - before).abs() <= step / 2 + 2**-11 * (low.abs() + high - low) + 1e-6).all()


def test_codes_of_a_page_lie_where_the_format_says() -> None:
    """By hand: 2 bits, 5 channels; each channel counts 0 1 2 3 over the tokens in steps of its own."""
    codec = Codec(2, 5, True)
    assert (codec.row_bytes, codec.page_bytes) == (2, 128)
    steps, minima = torch.tensor([1.0, 2, 4, 8, 0]), torch.tensor([0.0, -1, 2, -3, 7])
    page = pages_reference.encode(codec, torch.bfloat16, torch.arange(PAGE).view(-1, 1) % 4 * steps + minima)
    rows = page[: 2 * PAGE].view(PAGE, 2)
    for token in range(PAGE):  # four codes in a byte, the first in the lowest bits; what does not vary has code 0
        assert rows[token].tolist() == [(token % 4) * 0b01010101, 0]
    assert page[64:74].view(torch.float16).tolist() == steps.tolist()
    assert page[74:84].view(torch.float16).tolist() == minima.tolist()
    values = Codec(4, 33, False)  # 17 bytes a row, two groups
    numbers = torch.arange(33).float().repeat(PAGE, 1)
    page = pages_reference.encode(values, torch.bfloat16, numbers)
    assert page[16].item() == 0  # the last channel is alone in its group, and the row's last nibble is none
    scales, minima = page[17 * PAGE : 17 * PAGE + 8 * PAGE].view(torch.float16).view(2, PAGE, 2)
    assert scales[5].tolist() == [torch.tensor(31 / 15).half().item(), 0]
    assert minima[5].tolist() == [0, 32]


@pytest.mark.parametrize("per_channel", [False, True])
def test_offsets_and_factors_of_channels_are_taken_off_before_and_put_back(per_channel: bool) -> None:
    codec = Codec(4, 40, per_channel, group=40, affine=True)
    numbers, side = torch.randn(PAGE, 40), torch.cat([torch.randn(40) * 5, torch.rand(40) * 9 + 0.1])
    plain = Codec(4, 40, per_channel, group=40)
    expected = pages_reference.decode(plain, torch.bfloat16, pages_reference.encode(plain, torch.bfloat16, numbers))
    there = numbers * side[40:] + side[:40]
    found = pages_reference.decode(
        codec, torch.bfloat16, pages_reference.encode(codec, torch.bfloat16, there, side), side
    )
    assert torch.allclose(found, expected * side[40:] + side[:40], atol=1e-3)


def test_outliers_are_exact_and_the_others_are_coded_as_if_they_were_not_there() -> None:
    torch.manual_seed(0)
    numbers, places = torch.randn(PAGE, 40).bfloat16().float(), torch.tensor([3, 70, 500, 1279])
    far = numbers.flatten().scatter(0, places, torch.tensor([50.0, -60, 70, -80])).view_as(numbers)
    with_outliers, without = Codec(2, 40, False, outliers=4), Codec(2, 40, False)
    decoded = {
        codec.outliers: pages_reference.decode(
            codec, torch.bfloat16, pages_reference.encode(codec, torch.bfloat16, far)
        )
        for codec in (with_outliers, without)
    }
    assert torch.equal(decoded[4].flatten()[places], far.flatten()[places])
    others = torch.ones(PAGE * 40, dtype=torch.bool)
    others[places] = False
    apart = {count: float((found - far).flatten()[others].square().mean()) for count, found in decoded.items()}
    assert apart[4] < apart[0] / 2
    assert with_outliers.page_bytes == without.page_bytes + 64  # 16 bytes, in whole lines


def test_what_codes_miss_is_kept_along_directions() -> None:
    """Along all directions there are nothing is missed, but rounding to float16; along more, less."""
    torch.manual_seed(0)
    numbers, basis = torch.randn(PAGE, 24), torch.linalg.qr(torch.randn(24, 24)).Q
    missed = []
    for rank in (0, 6, 12, 24):
        codec, side = Codec(2, 24, True, rank=rank), basis[:rank].flatten()
        page = pages_reference.encode(codec, torch.float32, numbers, side)
        missed.append(float((pages_reference.decode(codec, torch.float32, page, side) - numbers).square().mean()))
    assert missed[0] > missed[1] > missed[2] > 1e3 * missed[3]


@compiled
@given(case=cases())
@settings(max_examples=16, deadline=None)
def test_compiled_pages_have_the_bits_of_the_reference(level: str, case: Case) -> None:
    stores = []
    for kernels in (level, cpu.REFERENCE):
        cpu.use(kernels)
        stores.append(Store(case))
        stores[-1].grow(1)
    one, other = (store.pages for store in stores)
    for head, tokens in enumerate(stores[0].held[1]):
        for j in range(max(tokens.coded, tokens.cold)):
            place = pages_reference._where(one, 1, head, j)
            both = [pages_reference._stored(p, 1, head, j, place) for p in (one, other)]
            for codec, page, expected in zip(case.codecs(), *both, strict=False):  # no values that are part of the keys
                used = PAGE * codec.row_bytes + 4 * codec.scales
                assert torch.equal(page[:used], expected[:used])
    assert torch.equal(one.bounds.nan_to_num(7), other.bounds.nan_to_num(7))  # type: ignore[union-attr]


# ---- what is kept ----


@levels
@given(case=cases())
@settings(max_examples=12, deadline=None)
def test_pages_hold_what_was_kept_and_none_is_lost(level: str, case: Case) -> None:
    cpu.use(level)
    store = Store(case)
    for _ in range(4):
        for sequence in range(SEQUENCES):
            store.grow(sequence)
        store.pages.reset(0)
        store.pages.tokens[0] = 0
        store.held[0] = [Tokens(t.k[:0], t.v[:0], t.positions[:0]) for t in store.held[0]]


# ---- attention ----


@levels
@given(case=cases(), threads=st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_rows_that_decode_see_what_is_kept(level: str, case: Case, threads: int) -> None:
    """Rows of two sequences at once: attention, what its softmax divides by, and what each token is given."""
    cpu.use(level)
    cpu.set_threads(threads)
    store, counts = Store(case), (3, 2)
    for sequence in range(SEQUENCES):
        store.grow(sequence)
    appended = [store.append(sequence, n) for sequence, n in enumerate(counts)]
    rows, n = together(*(one[0] for one in appended)), sum(counts)
    looking, (out, lse) = case.looking(n), case.results(n)
    mass = torch.zeros(SEQUENCES, case.kv_heads, TABLE_PAGES * PAGE)
    given = torch.zeros_like(mass, dtype=torch.double)
    pages.attend_rows(store.pages, rows, looking, out, lse, scratch(), case.scoring())
    pages.weigh_rows(store.pages, rows, looking, lse, mass, scratch(), case.scoring())
    row = 0
    for sequence, (_, k, v) in enumerate(appended):
        for i in range(counts[sequence]):
            for head in range(case.kv_heads):
                heads = slice(head * case.groups, (head + 1) * case.groups)
                behind = k[head, : i + 1], v[head, : i + 1]
                result, total, weights = store.expected(looking, row, sequence, head, behind)
                # Float32 against float64, for values of up to 5.
                torch.testing.assert_close(out[row, heads].double(), result, rtol=0, atol=2e-5)
                torch.testing.assert_close(lse[row, heads].double(), total, rtol=0, atol=2e-5)
                given[sequence, head, : len(weights)] += weights
            row += 1
    torch.testing.assert_close(mass.double(), given, rtol=0, atol=2e-5)


@levels
@given(case=cases(), threads=st.integers(1, 3), bf16=st.booleans())
@settings(max_examples=12, deadline=None)
def test_tokens_of_a_run_see_what_is_kept_and_the_run(level: str, case: Case, threads: int, bf16: bool) -> None:
    cpu.use(level)
    cpu.set_threads(threads)
    store = Store(case)
    if case.seed % 5:  # else the run is the first of its sequence
        store.grow(1)
    run = store.run(store.random.randint(1, 200))
    start = store.random.randint(0, run.count - 1)
    n = store.random.randint(1, min(run.count - start, 50))
    looking, (out, lse) = case.looking(n), case.results(n)
    longest = max(len(tokens) for tokens in store.held[1]) + run.count
    mass = torch.zeros(case.kv_heads, longest + 5)
    given = torch.zeros_like(mass, dtype=torch.double)
    pages.attend(store.pages, 1, run, start, looking, out, lse, scratch(), case.scoring(), bf16)
    # Products in bfloat16 round queries, keys, weights and values by 2**-9: scores of up to 15 and values up to 5.
    tolerance = 0.15 if bf16 and level == "amx" else 2e-5
    exact = torch.empty_like(lse)
    for head in range(case.kv_heads):
        heads = slice(head * case.groups, (head + 1) * case.groups)
        k, v = store.run_tokens(run, head)
        for row in range(n):
            behind = k[: start + row + 1], v[: start + row + 1]
            result, total, weights = store.expected(looking, row, 1, head, behind)
            torch.testing.assert_close(out[row, heads].double(), result, rtol=0, atol=tolerance)
            torch.testing.assert_close(lse[row, heads].double(), total, rtol=0, atol=tolerance)
            exact[row, heads] = total.float()
            given[head, : len(weights)] += weights
    pages.weigh(store.pages, 1, run, start, looking, exact, mass, scratch(), case.scoring())
    torch.testing.assert_close(mass.double(), given, rtol=0, atol=1e-4)


@levels
@given(case=cases(), giving=st.sampled_from(["max", "votes"]), last=st.integers(1, PAGE), threads=st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_what_tokens_are_given_is_put_together_in_other_ways_than_sums(
    level: str, case: Case, giving: str, last: int, threads: int
) -> None:
    """From what each of the queries gives alone, which the tests above know."""
    case = dataclasses.replace(case, groups=1)
    cpu.use(level)
    cpu.set_threads(threads)
    store, n = Store(case), 5
    store.grow(1)
    before, capacity = int(store.pages.tokens[1]), TABLE_PAGES * PAGE
    run, (rows, _, _) = store.run(n), store.append(1, n)
    looking, (out, lse) = case.looking(n), case.results(n)

    def decoding(which: slice, giving: str, mass_: torch.Tensor) -> None:
        some = Rows(rows.places[which].contiguous())
        only = PAGE if giving == "sum" else last
        pages.weigh_rows(store.pages, some, part(looking, which), lse[which], mass_, scratch(), scoring, giving, only)

    def prefilling(which: slice, giving: str, mass_: torch.Tensor) -> None:
        seen = part(looking, which)
        pages.weigh(store.pages, 1, run, which.start, seen, lse[which], mass_[1], scratch(), scoring, giving)

    scoring, every = case.scoring(), list(range(n))
    pages.attend_rows(store.pages, rows, looking, out, lse, scratch(), scoring)
    of_block = [row for row in every if (before + row) % PAGE >= PAGE - last]
    for weigh, counting in ((decoding, of_block), (prefilling, every)):
        found = torch.zeros(SEQUENCES, case.kv_heads, capacity)
        each = torch.zeros(n, *found.shape)
        weigh(slice(0, n), giving, found)
        for row in counting:
            weigh(slice(row, row + 1), "sum", each[row])
        if giving == "max":
            torch.testing.assert_close(found, each.amax(0))
            continue
        seen = torch.arange(before + 1, before + n + 1).clamp(max=case.window or capacity)
        shares = each * seen.view(-1, 1, 1, 1)
        close = ((shares - 1).abs() < 1e-3).sum(0)  # a vote that rounding decides
        assert ((found - (shares >= 1).sum(0)).abs() <= close).all()


def part(looking: Looking, which: slice) -> Looking:
    turned = None if looking.anchor_q is None else looking.anchor_q[which]
    return looking._replace(q=looking.q[which], anchor_q=turned)


@levels
@given(case=cases(), data=st.data())
@settings(max_examples=12, deadline=None)
def test_a_node_of_a_tree_gets_what_plain_decoding_of_its_path_does(
    level: str, case: Case, data: st.DataObject
) -> None:
    cpu.use(level)
    cpu.set_threads(data.draw(st.integers(1, 3)))
    if not case.positions:  # tokens that were let go leave those behind them at other positions
        case = dataclasses.replace(case, window=None)
    store, scoring = Store(case), case.scoring()
    store.grow(1)
    n = data.draw(st.integers(1, 10))
    paths: list[list[int]] = []
    for node in range(n):
        parent = data.draw(st.integers(-1, node - 1))
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    chain = copied(store.pages)
    rows, k, v = store.append(1, n)
    listed = torch.full((n, n + 1), -1, dtype=torch.int32)
    for node, path in enumerate(paths):
        listed[node, : len(path)] = torch.tensor(path)
    looking, (out, lse) = case.looking(n), case.results(n)
    pages.attend_rows(store.pages, Rows(rows.places, listed), looking, out, lse, scratch(), scoring)

    node = data.draw(st.integers(0, n - 1))
    start, lengths = int(chain.tokens[1]), chain.lengths[1].clone()
    for i, step in enumerate(paths[node]):  # committed one by one, as plain decoding does
        one = Rows(torch.tensor([[1, start + i]], dtype=torch.int32))
        pages.append(chain, one, k[:, step].unsqueeze(0), None if case.shared else v[:, step].unsqueeze(0))
        alone = Looking(
            looking.q[step : step + 1],
            None if looking.anchor_q is None else looking.anchor_q[step : step + 1],
            looking.anchors,
        )
        plain, total = case.results(1)
        pages.attend_rows(chain, one, alone, plain, total, scratch(), scoring)
        assert torch.equal(plain[0], out[step])
        assert torch.equal(total[0], lse[step])
        if chain.positions is not None:
            for head, length in enumerate(lengths.tolist()):
                chain.positions[1, head, length + i] = start + i
        chain.lengths[1] += 1
        chain.tokens[1] += 1

    store.commit(1, paths[node], k, v)  # and in one piece, from the tree
    for head in range(case.kv_heads):
        for p in (chain, store.pages):
            ws, length = scratch(), len(store.held[1][head])
            keys, values = pages.read(p, 1, head, store.run(0), 0, length, ws)
            assert torch.equal(keys, store.held[1][head].k)
            assert case.shared or torch.equal(values, store.held[1][head].v)


@levels
@given(case=cases(), threads=st.integers(1, 3), data=st.data())
@settings(max_examples=12, deadline=None)
def test_rows_see_the_pages_that_were_chosen(level: str, case: Case, threads: int, data: st.DataObject) -> None:
    case = dataclasses.replace(case, window=None, anchors=0)
    cpu.use(level)
    cpu.set_threads(threads)
    store = Store(case)
    store.grow(1)
    rows, k, v = store.append(1, 2)
    bounded = store.pages.bounded[1].tolist()
    chosen = torch.full((2, case.kv_heads, data.draw(st.integers(1, max(bounded) + 2))), -1, dtype=torch.int32)
    for row in range(2):
        for head in range(case.kv_heads):
            some = sorted(store.random.sample(range(bounded[head]), min(bounded[head], chosen.shape[2])))
            some = some[: store.random.randint(0, len(some))]
            chosen[row, head, : len(some)] = torch.tensor(some)
    looking, (out, lse) = case.looking(2, chosen), case.results(2)
    mass = torch.zeros(SEQUENCES, case.kv_heads, TABLE_PAGES * PAGE)
    given = torch.zeros_like(mass, dtype=torch.double)
    pages.attend_rows(store.pages, rows, looking, out, lse, scratch(), case.scoring())
    pages.weigh_rows(store.pages, rows, looking, lse, mass, scratch(), case.scoring())
    for row in range(2):
        for head in range(case.kv_heads):
            listed = [page * PAGE + i for page in chosen[row, head].tolist() if page >= 0 for i in range(PAGE)]
            behind = k[head, : row + 1], v[head, : row + 1]
            result, total, weights = store.expected(
                looking, row, 1, head, behind, torch.tensor(listed, dtype=torch.long), bounded[head] * PAGE
            )
            heads = slice(head * case.groups, (head + 1) * case.groups)
            torch.testing.assert_close(out[row, heads].double(), result, rtol=0, atol=2e-5)
            torch.testing.assert_close(lse[row, heads].double(), total, rtol=0, atol=2e-5)
            given[1, head, : len(weights)] += weights
    torch.testing.assert_close(mass.double(), given, rtol=0, atol=2e-5)


@levels
@given(case=cases(), threads=st.integers(1, 3), share=st.sampled_from([0.0, 0.05, 0.5, 1.0]), tree=st.booleans())
@settings(max_examples=10, deadline=None)
def test_rows_see_the_tokens_that_are_listed(level: str, case: Case, threads: int, share: float, tree: bool) -> None:
    case = dataclasses.replace(case, window=None, anchors=0)
    cpu.use(level)
    cpu.set_threads(threads)
    store = Store(case)
    store.grow(1, 900)
    rows, k, v = store.append(1, 2)
    if tree:  # two roots
        rows = Rows(rows.places, torch.tensor([[0, -1], [1, -1]], dtype=torch.int32))
    lengths = [len(tokens) for tokens in store.held[1]]
    listed = torch.full((2, case.kv_heads, max(lengths) + 2), -1, dtype=torch.int32)
    since = torch.zeros(2, case.kv_heads, dtype=torch.int32)
    for row, head in itertools.product(range(2), range(case.kv_heads)):
        since[row, head] = lengths[head] - store.random.randint(0, min(40, lengths[head]))
        some = [i for i in range(int(since[row, head])) if store.random.random() < share]
        listed[row, head, : len(some)] = torch.tensor(some)
    looking, (out, lse) = case.looking(2)._replace(listed=listed, since=since), case.results(2)
    mass = torch.zeros(SEQUENCES, case.kv_heads, TABLE_PAGES * PAGE)
    given = torch.zeros_like(mass, dtype=torch.double)
    pages.attend_rows(store.pages, rows, looking, out, lse, scratch(), case.scoring())
    pages.weigh_rows(store.pages, rows, looking, lse, mass, scratch(), case.scoring())
    for row, head in itertools.product(range(2), range(case.kv_heads)):
        own = [row] if tree else list(range(row + 1))
        some = listed[row, head][listed[row, head] >= 0].long()
        behind = k[head, own], v[head, own]
        result, total, weights = store.expected(looking, row, 1, head, behind, some, int(since[row, head]))
        heads = slice(head * case.groups, (head + 1) * case.groups)
        torch.testing.assert_close(out[row, heads].double(), result, rtol=0, atol=2e-5)
        torch.testing.assert_close(lse[row, heads].double(), total, rtol=0, atol=2e-5)
        given[1, head, : len(weights)] += weights
    torch.testing.assert_close(mass.double(), given, rtol=0, atol=2e-5)


@levels
@given(case=cases(), threads=st.integers(1, 3), share=st.sampled_from([0.0, 0.6, 1.0]))
@settings(max_examples=8, deadline=None)
def test_shares_are_the_softmax_over_the_first_tokens(level: str, case: Case, threads: int, share: float) -> None:
    cpu.use(level)
    cpu.set_threads(threads)
    store = Store(case)
    store.grow(1, 900)
    until = torch.tensor([int(len(tokens) * share) for tokens in store.held[1]], dtype=torch.int32)
    q, found, ws = case.looking(1).q[0], torch.full((case.kv_heads, TABLE_PAGES * PAGE), math.nan), scratch()
    pages.shares(store.pages, 1, q, until, found, pages.shares_scratch(store.pages, case.heads, ws), case.scoring())
    for head, count in enumerate(until.tolist()):
        queries = q[head * case.groups : (head + 1) * case.groups].double()
        scores = store.held[1][head].k[:count].double() @ queries.T * case.scoring().scale
        if case.softcap is not None:
            scores = case.softcap * (scores / case.softcap).tanh()
        torch.testing.assert_close(found[head, :count].double(), scores.softmax(0).sum(1), rtol=1e-4, atol=1e-6)
        assert found[head, count:].isnan().all()


@compiled
def test_tokens_that_are_not_there_cannot_be_listed(level: str) -> None:
    cpu.use(level)
    case = Case()
    store = Store(case)
    store.keep(0, store.run(10), tail=10)
    looking, (out, lse) = case.looking(1), case.results(1)
    rows = Rows(torch.tensor([[0, 10]], dtype=torch.int32))
    for since, some in ((11, [0]), (-1, [0]), (5, [5]), (9, [4, 3]), (9, [3, 3])):
        listed = torch.full((1, case.kv_heads, 4), -1, dtype=torch.int32)
        listed[..., : len(some)] = torch.tensor(some)
        listing = looking._replace(listed=listed, since=torch.full((1, case.kv_heads), since, dtype=torch.int32))
        with pytest.raises(IndexError):
            pages.attend_rows(store.pages, rows, listing, out, lse, scratch(), case.scoring())


@levels
def test_of_pages_in_the_file_only_listed_tokens_are_read(level: str) -> None:
    """Others are made unreadable, in the pages where some are listed too."""
    cpu.use(level)
    case = Case(kv_heads=1, dtype=torch.float32, file=True, resident=0)
    store = Store(case)
    store.keep(1, store.run(3 * PAGE))
    p = store.pages
    listed = [0, 1, 40, 41, 70]
    for page in range(3):
        for (at, nbytes), dim in zip(p.file_places(1, 0, page), (case.key_dim, case.value_dim), strict=True):
            assert nbytes >= PAGE * dim * 4
            here = [token % PAGE for token in listed if token // PAGE == page]
            for token in range(PAGE):
                if token not in range(here[0], here[-1] + 1):
                    os.pwrite(p.file, b"\xff" * dim * 4, at + token * dim * 4)
    rows, (out, lse) = store.append(1, 1)[0], case.results(1)
    looking = case.looking(1)._replace(
        listed=torch.tensor([[listed]], dtype=torch.int32), since=torch.tensor([[3 * PAGE]], dtype=torch.int32)
    )
    pages.attend_rows(p, rows, looking, out, lse, scratch(), case.scoring())
    assert out.isfinite().all()


@levels
@given(case=cases(), threads=st.integers(1, 3), count=st.integers(1, 14))
@settings(max_examples=12, deadline=None)
def test_the_pages_with_the_largest_bounds_are_selected(level: str, case: Case, threads: int, count: int) -> None:
    cpu.use(level)
    cpu.set_threads(threads)
    store = Store(case)
    for sequence in range(SEQUENCES):
        store.grow(sequence)
    rows = together(store.append(0, 2)[0], store.append(1, 1)[0])
    looking = case.looking(3)
    chosen = torch.full((3, case.kv_heads, count), 99, dtype=torch.int32)
    pages.select(store.pages, rows, looking.q, chosen, scratch())
    for row, (sequence, _) in enumerate(rows.places.tolist()):
        for head, tokens in enumerate(store.held[sequence]):
            bounds = store.pages.bounds_of(sequence, head)
            whole = 0 if bounds is None else len(tokens) // PAGE
            picked = [page for page in chosen[row, head].tolist() if page >= 0]
            assert chosen[row, head].tolist() == picked + [-1] * (count - len(picked))
            assert len(picked) == min(count, whole)
            assert picked == sorted(set(picked) & set(range(whole)))
            if bounds is None:
                continue
            q = looking.q[row, head * case.groups : (head + 1) * case.groups].double()
            sides = q[:, None, None, None] * bounds[:whole].double()
            largest = sides.amax(3).sum(-1).amax((0, 2))
            scores = (tokens.k[: whole * PAGE].double() @ q.T).view(whole, PAGE, case.groups).amax((1, 2))
            assert (scores <= largest + 1e-6).all()
            others = [page for page in range(whole) if page not in picked]
            if others and picked:
                assert largest[picked].min() >= largest[others].max() - 1e-4  # float32: sums of up to 72 products


@compiled
@given(case=cases(), bf16=st.booleans(), data=st.data())
@settings(max_examples=12, deadline=None)
def test_bits_depend_on_the_query_and_what_it_sees_only(
    level: str, case: Case, bf16: bool, data: st.DataObject
) -> None:
    """Not on the other rows of the call, nor on threads."""
    cpu.use(level)
    store, scoring = Store(case), case.scoring()
    for sequence in range(SEQUENCES):
        store.grow(sequence, 900)
    rows = together(store.append(0, 4)[0], store.append(1, 3)[0])
    run = store.run(data.draw(st.integers(7, 300)))
    start = data.draw(st.integers(0, run.count - 7))
    looking, results = case.looking(7), {}
    chosen = torch.full((7, case.kv_heads, 5), -1, dtype=torch.int32)

    def part(a: int, b: int) -> list[torch.Tensor]:
        seen = Looking(
            looking.q[a:b], None if looking.anchor_q is None else looking.anchor_q[a:b], looking.anchors, None
        )
        out, lse = case.results(b - a)
        pages.attend_rows(store.pages, Rows(rows.places[a:b].contiguous()), seen, out, lse, scratch(), scoring)
        found = [out, lse]
        out, lse = case.results(b - a)
        pages.attend(store.pages, 1, run, start + a, seen, out, lse, scratch(), scoring, bf16)
        picked = chosen[a:b].clone()
        pages.select(store.pages, Rows(rows.places[a:b].contiguous()), seen.q, picked, scratch())
        return [*found, out, lse, picked]

    cpu.set_threads(1)
    results = part(0, 7)
    cpu.set_threads(data.draw(st.integers(2, 4)))
    a = data.draw(st.integers(0, 6))
    b = data.draw(st.integers(a + 1, 7))
    for whole, cut in zip(results, part(a, b), strict=True):
        assert torch.equal(whole[a:b], cut)


# ---- room ----


@levels
def test_keeping_the_recent_tokens_needs_no_more_room_than_before_and_afterwards(level: str) -> None:
    """Though pages that were coded are dense afterwards, and others the other way around."""
    case = Case(kv_heads=1, pool=True, key_bits=4, value_bits=4, recent=40)
    cpu.use(level)
    store = Store(case, dense_pages=4)  # for up to 71 tokens that are not coded and the next 32
    store.keep(1, store.run(380), tail=PAGE)
    for most in (0, 200, 30, 100, 10):
        _, k, v = store.append(1, PAGE)
        store.commit(1, list(range(PAGE)), k, v)
        kept = []
        for tokens in store.held[1]:
            old = range(len(tokens) - 71)
            gone = set(store.random.sample(old, min(most, len(old))))
            kept.append(torch.tensor([i for i in range(len(tokens)) if i not in gone]))
        store.keep(1, store.run(0), kept, tail=PAGE)


@levels
def test_a_store_that_is_too_small_says_so(level: str) -> None:
    cpu.use(level)
    store = Store(Case(kv_heads=1), dense_pages=2)
    store.keep(0, store.run(40), tail=10)
    with pytest.raises(RuntimeError, match="no page is left"):
        store.keep(0, store.run(40), tail=10)


@levels
@given(case=cases(), bf16=st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_dry_run_of_an_empty_store_foresees_the_scratch_of_every_step(level: str, case: Case, bf16: bool) -> None:
    cpu.use(level)

    def used(store: Store, n: int) -> list[int]:
        looking, (out, lse), scoring = case.looking(n), case.results(n), case.scoring()
        p, run, needed = store.pages, store.run(n), []
        rows = Rows(torch.tensor([[1, int(p.tokens[1])]] * n, dtype=torch.int32))
        chosen, mass = torch.empty(n, case.kv_heads, 4, dtype=torch.int32), torch.zeros(SEQUENCES, case.kv_heads, 1100)
        for call in (
            lambda ws: pages.attend_rows(p, rows, looking, out, lse, ws, scoring),
            lambda ws: pages.attend(p, 1, run, 0, looking, out, lse, ws, scoring, bf16),
            lambda ws: pages.weigh_rows(p, rows, looking, lse, mass, ws, scoring),
            lambda ws: pages.weigh(p, 1, run, 0, looking, lse, mass[1], ws, scoring),
            lambda ws: pages.select(p, rows, looking.q, chosen, ws),
            lambda ws: pages.keep(p, 1, run, ws, recent=case.recent, resident=case.resident),
        ):
            ws = scratch()
            call(ws)
            needed.append(ws.high_water)
        return needed

    with ops.dry():
        foreseen = used(Store(case), 9)
    store = Store(case)
    store.grow(1)
    for n in (9, 4, 1):
        for needed, expected in zip(used(store, n), foreseen, strict=True):
            assert needed <= expected
        store.pages.tokens[1] += n


@compiled
def test_what_compiled_kernels_would_read_or_write_elsewhere_is_refused(level: str) -> None:
    cpu.use(level)
    case = Case()
    store = Store(case)
    store.keep(0, store.run(10), tail=10)
    looking, (out, lse), ws = case.looking(1), case.results(1), scratch()
    k, v = torch.zeros(1, case.kv_heads, case.key_dim), torch.zeros(1, case.kv_heads, case.value_dim)
    for place in ([SEQUENCES, 10], [-1, 10], [0, 9], [0, 32], [1, 0]):
        rows = Rows(torch.tensor([place], dtype=torch.int32))
        with pytest.raises(IndexError):
            pages.append(store.pages, rows, k, v)
        with pytest.raises(IndexError):
            pages.attend_rows(store.pages, rows, looking, out, lse, ws, case.scoring())
    good = Rows(torch.tensor([[0, 10]], dtype=torch.int32))
    with pytest.raises(ValueError, match="expected"):
        pages.append(store.pages, good, k.half(), v)
    with pytest.raises(ValueError, match="expected"):
        pages.append(store.pages, Rows(good.places.long()), k, v)
    with pytest.raises(IndexError):
        pages.keep(store.pages, SEQUENCES, store.run(1), ws)
    with pytest.raises(IndexError):
        pages.read(store.pages, 0, case.kv_heads, store.run(0), 0, 5, ws)
    with pytest.raises(IndexError):
        pages.read(store.pages, 0, 0, store.run(0), 0, 11, ws)


# ---- two sets of tokens ----


@levels
def test_attention_over_two_sets_of_tokens_joins_to_that_over_both(level: str) -> None:
    """Scores of 20 tokens; of the third row all are in one set, and of the fourth all in the other."""
    cpu.use(level)
    torch.manual_seed(0)
    scores, values = torch.randn(5, 3, 20) * 4, torch.randn(20, 9)
    first = torch.rand(5, 3, 20) < 0.5
    first[2], first[3] = True, torch.arange(20) < 1
    whole, whole_lse = scores.softmax(-1) @ values, scores.logsumexp(-1) / math.log(2)
    outs, sums = [], []
    for seen in (first, ~first):
        hidden = scores.masked_fill(~seen, -torch.inf)
        outs.append((hidden.softmax(-1) @ values).contiguous())  # no numbers where nothing is seen
        sums.append(hidden.logsumexp(-1) / math.log(2))
    pages.join(outs[0], sums[0], outs[1], sums[1])
    assert torch.allclose(outs[0], whole, atol=1e-5)
    assert torch.allclose(sums[0], whole_lse, atol=1e-5)


@levels
def test_rows_that_see_only_what_is_certain_see_nothing_of_a_run_or_of_themselves(level: str) -> None:
    cpu.use(level)
    case = Case(pool=True, key_bits=4, value_bits=4, seed=3)
    store, ws, scoring = Store(case), scratch(), case.scoring()
    run = store.run(50)
    store.keep(0, run)
    looking = case.looking(3)._replace(certain=True)
    with ws.frame():
        k, v = pages.read(store.pages, 0, 0, store.run(1), 0, 50, ws)
        weights = (looking.q[:, : case.groups] @ k.T * scoring.scale).softmax(-1)
        expected = weights @ v
    places = torch.tensor([(0, 50), (0, 51), (1, 0)], dtype=torch.int32)
    out, lse = case.results(3)
    pages.attend_rows(store.pages, Rows(places), looking, out, lse, ws, scoring)
    assert torch.allclose(out[:2, : case.groups], expected[:2], atol=1e-4)
    assert (lse[2] == -torch.inf).all()  # this sequence has no token
    pages.attend(store.pages, 0, store.run(0), 0, looking, out, lse, ws, scoring)
    assert torch.allclose(out[:, : case.groups], expected, atol=1e-4)


@levels
def test_projections_are_those_of_each_head(level: str) -> None:
    cpu.use(level)
    for n, heads, dim, width in ((3, 4, 7, 5), (70, 4, 64, 83)):  # few products, and enough for threads
        x, matrices, out = (
            torch.randn(n, heads, dim),
            torch.randn(2, dim, width),
            torch.full((n, heads, width), torch.nan),
        )
        pages.project(x, matrices, out)
        expected = torch.einsum("ngd,gdm->ngm", x, matrices.repeat_interleave(heads // 2, 0))
        assert torch.allclose(out, expected, atol=1e-4)
        alone = torch.empty(1, heads, width)
        pages.project(x[1:2], matrices, alone)
        assert torch.equal(alone[0], out[1])
