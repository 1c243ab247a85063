"""The operations of :mod:`tightfit.kernels.pages` in torch, on the same memory: what is stored is the same to the bit.

Tokens are read in blocks, so that scratch does not grow with the context. Each row and head is computed alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tightfit.kernels.codec import PAGE, Codec
from tightfit.kernels.reference import LOG2_E

if TYPE_CHECKING:
    from tightfit.kernels.attention import Scoring
    from tightfit.kernels.pages import Looking, Pages, Rows, Run

BLOCK = 512  # tokens whose keys and values are held at once
LOWEST = torch.finfo(torch.float32).min  # the maximum before any score: scores minus it are numbers
NOWHERE, FILE, CODED, DENSE = range(4)

KeysValues = tuple[torch.Tensor, torch.Tensor]

# ---- codes ----


def encode(codec: Codec, dtype: torch.dtype, numbers: torch.Tensor, side: torch.Tensor | None = None) -> torch.Tensor:
    """The page (page_bytes,) uint8 of ``numbers`` (PAGE, dim) float32; ``dtype`` is what numbers as they are have, and
    ``side`` (n,) float32 the codec's table, if it has one."""
    if codec.dense:
        parts = [numbers.to(dtype)]
    elif codec.coupled and side is not None:
        parts = [_packed(codec, _nearest(codec, numbers, side))]
    else:
        parts = _coded(codec, dtype, numbers, side)
    page = torch.zeros(codec.page_bytes, dtype=torch.uint8)
    stored = torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts])
    page[: len(stored)] = stored
    return page


def _coded(codec: Codec, dtype: torch.dtype, numbers: torch.Tensor, side: torch.Tensor | None) -> list[torch.Tensor]:
    axis, x = 0 if codec.per_channel else 1, numbers
    if codec.affine and side is not None:
        offset, factor = side[: 2 * codec.dim].view(2, -1)
        x = (x - offset) / factor
    outliers: list[torch.Tensor] = []
    if codec.outliers:
        middle = x.median(axis, keepdim=True).values.expand_as(x)
        furthest = (x - middle).abs().flatten().sort(descending=True, stable=True).indices[: codec.outliers]
        outliers = [furthest.to(torch.uint16), numbers.flatten()[furthest].to(dtype)]
        x = x.flatten().scatter(0, furthest, middle.flatten()[furthest]).view_as(x)
    parted = [x] if codec.per_channel else x.split(codec.group, 1)
    low = torch.stack([part.amin(axis) for part in parted], -1)
    high = torch.stack([part.amax(axis) for part in parted], -1)
    scale, minimum = ((high - low) / (2**codec.bits - 1)).half(), low.half()
    steps = (x - _spread(codec, minimum)) / _spread(codec, scale)
    codes = torch.where(_spread(codec, scale) > 0, steps.round().clamp(0, 2**codec.bits - 1), 0)
    parts = [_packed(codec, codes.byte()), scale, minimum]
    if codec.rank and side is not None:
        missed = x - (codes * _spread(codec, scale) + _spread(codec, minimum))
        if codec.outliers:
            missed = missed.flatten().scatter(0, furthest, 0.0).view_as(missed)
        directions = side[codec.side - codec.rank * codec.dim :].view(codec.rank, -1)
        along = torch.zeros(PAGE, codec.rank)
        for channel in range(codec.dim):  # in this order
            along = along + missed[:, channel, None] * directions[:, channel]
        parts.append(along.half())
    return parts + outliers


def _packed(codec: Codec, codes: torch.Tensor) -> torch.Tensor:
    """``codes`` (PAGE, n) uint8, as many in a byte as there is room for."""
    shifts = torch.arange(0, 8, codec.bits, dtype=torch.uint8)
    padded = torch.nn.functional.pad(codes, (0, -codec.codes % len(shifts)))
    packed: torch.Tensor = (padded.view(PAGE, -1, len(shifts)) << shifts).sum(-1, dtype=torch.uint8)
    return packed


def _unpacked(codec: Codec, page: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(0, 8, codec.bits, dtype=torch.uint8)
    codes: torch.Tensor = (page[: PAGE * codec.row_bytes].view(PAGE, -1, 1) >> shifts) & (2**codec.bits - 1)
    return codes.flatten(1)[:, : codec.codes]


def _nearest(codec: Codec, numbers: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """The codes (PAGE, n) uint8 of the nearest centroids."""
    centroids = side.view(codec.codes, -1, codec.coupled)
    parts, distances = numbers.view(PAGE, codec.codes, 1, codec.coupled), torch.zeros(())
    for i in range(codec.coupled):  # in this order
        distances = distances + (parts[..., i] - centroids[..., i]) ** 2
    return distances.sort(dim=-1, stable=True).indices[..., 0].byte()


def decode(codec: Codec, dtype: torch.dtype, page: torch.Tensor, side: torch.Tensor | None = None) -> torch.Tensor:
    """The numbers (PAGE, dim) float32 of a page."""
    at = PAGE * codec.row_bytes
    if codec.dense:
        return page[:at].view(dtype).view(PAGE, codec.dim).float()
    codes = _unpacked(codec, page)
    if codec.coupled and side is not None:
        centroids = side.view(codec.codes, -1, codec.coupled)
        return centroids[torch.arange(codec.codes), codes.long()].flatten(1)

    def take(count: int, kind: torch.dtype) -> torch.Tensor:
        nonlocal at
        begin, at = at, at + count * kind.itemsize
        return page[begin:at].clone().view(kind)

    scale, minimum = take(2 * codec.scales, torch.float16).view(2, -1)
    numbers: torch.Tensor = codes.float() * _spread(codec, scale) + _spread(codec, minimum)
    if codec.rank and side is not None:
        directions = side[codec.side - codec.rank * codec.dim :].view(codec.rank, 1, -1)
        of_tokens = take(PAGE * codec.rank, torch.float16).float().view(PAGE, -1)
        for along, direction in zip(of_tokens.T, directions, strict=True):
            numbers = numbers + along[:, None] * direction
    if codec.affine and side is not None:
        offset, factor = side[: 2 * codec.dim].view(2, -1)
        numbers = numbers * factor + offset
    if codec.outliers:
        places = take(codec.outliers, torch.uint16).long()
        numbers = numbers.flatten().scatter(0, places, take(codec.outliers, dtype).float()).view_as(numbers)
    return numbers


def _spread(codec: Codec, of_groups: torch.Tensor) -> torch.Tensor:
    """Of each number of a page what its group has, in float32."""
    if codec.per_channel:
        return of_groups.float().view(1, -1)
    return of_groups.float().view(PAGE, -1).repeat_interleave(codec.group, 1)[:, : codec.dim]


def _sides(pages: Pages, sequence: int, head: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The tables of the codecs of keys and of values of a head."""
    tables = pages.key_side, pages.value_side
    of_keys, of_values = (None if table is None else table[sequence % len(table), head] for table in tables)
    return of_keys, of_values


# ---- pages ----


def _where(pages: Pages, sequence: int, head: int, j: int) -> int:
    at = sequence, head
    if j < pages.cold[at]:
        return FILE
    if pages.table[sequence, head, j] < 0:
        return NOWHERE
    return CODED if pages.coded_keys is not None and j < pages.coded[at] else DENSE


def _stored(pages: Pages, sequence: int, head: int, j: int, place: int) -> list[torch.Tensor]:
    """Keys and values of a page that is not dense, as they are stored."""
    if place == FILE:
        found = [os.pread(pages.file, nbytes, at) for at, nbytes in pages.file_places(sequence, head, j)]
        return [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in found]
    number = pages.table[sequence, head, j]
    pools = [pages.coded_keys] if pages.shared else [pages.coded_keys, pages.coded_values]
    return [pool[sequence, number] for pool in pools if pool is not None]


def _load(pages: Pages, sequence: int, head: int, j: int) -> KeysValues:
    """Keys (PAGE, key_dim) and values (PAGE, value_dim) of page ``j``; channels that were let go are zeros."""
    place = _where(pages, sequence, head, j)
    if place == DENSE:
        number = pages.table[sequence, head, j]
        return pages.keys[sequence, number].float(), pages.values[sequence, number].float()
    stored = _stored(pages, sequence, head, j, place)
    dtype, value_dim = pages.keys.dtype, pages.values.shape[3]
    key_side, value_side = _sides(pages, sequence, head)
    keys = decode(pages.key_codec, dtype, stored[0], key_side)
    if pages.channels is not None:
        kept, keys = keys, torch.zeros(PAGE, pages.keys.shape[3])
        keys[:, pages.channels[sequence, head].long()] = kept
    return keys, keys[:, :value_dim] if pages.shared else decode(pages.value_codec, dtype, stored[1], value_side)


def _take(free: torch.Tensor) -> int:
    if free[0] == 0:
        raise RuntimeError("no page is left: the plan of the cache is mistaken")
    free[0] -= 1
    return int(free[free[0] + 1])


def _release(pages: Pages, sequence: int, head: int, j: int) -> None:
    """Gives the memory of page ``j`` back, if it has some."""
    place = _where(pages, sequence, head, j)
    if place in (CODED, DENSE):
        free = (pages.coded_free if place == CODED else pages.dense_free)[sequence]
        free[0] += 1
        free[free[0]] = pages.table[sequence, head, j]
    pages.table[sequence, head, j] = -1


def _store(
    pages: Pages, sequence: int, head: int, j: int, place: int, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Writes ``keys`` (n, key_dim) and ``values`` (n, value_dim), the first tokens of page ``j``, whose place is given;
    what is not dense is whole."""
    if _where(pages, sequence, head, j) != place:
        _release(pages, sequence, head, j)
        if place != FILE:
            free = pages.coded_free if place == CODED else pages.dense_free
            pages.table[sequence, head, j] = _take(free[sequence])
    number = pages.table[sequence, head, j]
    if place == DENSE:
        pages.keys[sequence, number, : len(keys)] = keys.to(pages.keys.dtype)
        if not pages.shared:
            pages.values[sequence, number, : len(values)] = values.to(pages.values.dtype)
        return
    if pages.channels is not None:
        keys = keys[:, pages.channels[sequence, head].long()]
    key_side, value_side = _sides(pages, sequence, head)
    stored = [encode(pages.key_codec, pages.keys.dtype, keys, key_side)]
    if not pages.shared:
        stored.append(encode(pages.value_codec, pages.keys.dtype, values, value_side))
    if place == FILE:
        _write(pages, sequence, head, j, stored)
        return
    for pool, page in zip((pages.coded_keys, pages.coded_values), stored, strict=False):
        if pool is not None:
            pool[sequence, number] = page


def _write(pages: Pages, sequence: int, head: int, j: int, stored: list[torch.Tensor]) -> None:
    """Writes a page to the file."""
    for page, (at, nbytes) in zip(stored, pages.file_places(sequence, head, j), strict=True):
        if os.pwrite(pages.file, page.numpy().tobytes(), at) != nbytes:
            raise RuntimeError("the cache cannot be written to the disk")


def _tokens(pages: Pages, sequence: int, head: int, places: torch.Tensor, run: Run | None = None) -> KeysValues:
    """Keys (n, key_dim) and values (n, value_dim) in float32 of the tokens at ``places`` (n,) int64 of a head's list.
    Behind the certain ones lie those of the run, or what was appended."""
    k, v = torch.empty(len(places), pages.keys.shape[3]), torch.empty(len(places), pages.values.shape[3])
    inside = torch.ones(len(places), dtype=torch.bool)
    if run is not None:
        order = places - pages.lengths[sequence, head]
        inside = order < 0
        k[~inside], v[~inside] = run.keys[head, order[~inside]].float(), run.values[head, order[~inside]].float()
    numbers = places // PAGE
    for j in numbers[inside].unique().tolist():
        here = inside & (numbers == j)
        keys, values = _load(pages, sequence, head, j)
        k[here], v[here] = keys[places[here] % PAGE], values[places[here] % PAGE]
    return k, v


# ---- attention ----


@dataclass
class _View:
    """What the query heads ``q`` (n, groups, key_dim) of one key-value head see: of the tokens ``listed`` (seen,)
    int64, places in the head's list, those up to their own. The first query is ``first`` tokens behind the certain
    ones."""

    pages: Pages
    sequence: int
    head: int
    q: torch.Tensor
    anchor_q: torch.Tensor
    anchors: int
    first: int
    listed: torch.Tensor
    scoring: Scoring
    run: Run | None = None
    path: torch.Tensor | None = None  # of the tokens behind the certain ones

    def blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Scores (n * groups, tokens) times log2(e), values (tokens, value_dim) and places of some tokens at a time."""
        n, groups, _ = self.q.shape
        own = self.pages.tokens[self.sequence] + self.first + torch.arange(n).repeat_interleave(groups).view(-1, 1)
        anchors = self.listed < self.anchors
        window = self.scoring.window
        for q, seen, reach in ((self.anchor_q, anchors, None), (self.q, ~anchors, window)):
            query = q.flatten(0, 1) * (self.scoring.scale * LOG2_E)
            for places in self.listed[seen].split(BLOCK):
                positions = self._positions(places)
                hidden = (places >= self._length()) & (positions > own)
                if reach is not None:
                    hidden |= positions <= own - reach
                if hidden.all():
                    continue
                k, v = _tokens(self.pages, self.sequence, self.head, self._stored(places), self.run)
                scores = query @ k.T
                if self.scoring.softcap is not None:
                    cap = self.scoring.softcap * LOG2_E
                    scores = (scores / cap).tanh() * cap
                yield scores.masked_fill(hidden, -torch.inf), v, places

    def _length(self) -> int:
        return int(self.pages.lengths[self.sequence, self.head])

    def _positions(self, places: torch.Tensor) -> torch.Tensor:
        behind = places >= self._length()
        positions = torch.where(behind, places - self._length() + self.pages.tokens[self.sequence], places)
        if self.pages.positions is not None:
            positions[~behind] = self.pages.positions[self.sequence, self.head, places[~behind]].long()
        return positions

    def _stored(self, places: torch.Tensor) -> torch.Tensor:
        """Places in the list of tokens as they were appended."""
        if self.path is None:
            return places
        order = (places - self._length()).clamp(min=0)
        return torch.where(places < self._length(), places, self._length() + self.path[order])


def _views_of_rows(pages: Pages, rows: Rows, looking: Looking, scoring: Scoring) -> Iterator[tuple[int, int, _View]]:
    kv_heads = pages.table.shape[1]
    q, anchor_q = _by_head(looking, kv_heads)
    for row, (sequence, position) in enumerate(rows.places[: len(q)].tolist()):
        path, first = None, position - int(pages.tokens[sequence])
        if rows.paths is not None:
            path = rows.paths[row][rows.paths[row] >= 0].long()
            first = len(path) - 1
        for head in range(kv_heads):
            behind = 0 if looking.certain else first + 1
            stop, anchors, seen_by = int(pages.lengths[sequence, head]) + behind, looking.anchors, scoring
            listed = torch.arange(stop)
            if looking.chosen is not None:
                chosen = looking.chosen[row, head][looking.chosen[row, head] >= 0]
                whole = (chosen.view(-1, 1) * PAGE + torch.arange(PAGE)).flatten()
                listed = torch.cat([whole, torch.arange(int(pages.bounded[sequence, head]) * PAGE, stop)])
                anchors, seen_by = 0, scoring._replace(window=None)
            elif looking.listed is not None and looking.since is not None:
                some = looking.listed[row, head][looking.listed[row, head] >= 0].long()
                listed = torch.cat([some, torch.arange(int(looking.since[row, head]), stop)])
                anchors, seen_by = 0, scoring._replace(window=None)
            one = q[row : row + 1, head], anchor_q[row : row + 1, head]
            yield row, head, _View(pages, sequence, head, *one, anchors, first, listed, seen_by, path=path)


def _view_of_run(
    pages: Pages, sequence: int, head: int, run: Run, start: int, looking: Looking, scoring: Scoring
) -> _View:
    q, anchor_q = _by_head(looking, pages.table.shape[1])
    listed = torch.arange(int(pages.lengths[sequence, head]) + (0 if looking.certain else start + len(q)))
    both = q[:, head], anchor_q[:, head]
    return _View(pages, sequence, head, *both, looking.anchors, start, listed, scoring, run)


def _by_head(looking: Looking, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both kinds of queries (n, kv_heads, groups, key_dim)."""
    turned = looking.q if looking.anchor_q is None else looking.anchor_q
    return looking.q.unflatten(1, (kv_heads, -1)), turned.unflatten(1, (kv_heads, -1))


def _fold(view: _View, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Attention into ``out`` (n, groups, value_dim), and what it divides by into ``lse`` (n, groups)."""
    n, groups, value_dim = out.shape
    top, total = torch.full((n * groups, 1), LOWEST), torch.zeros(n * groups, 1)
    acc = torch.zeros(n * groups, value_dim)
    if view.scoring.sinks is not None:  # as keys without values
        top = (view.scoring.sinks.unflatten(0, (-1, groups))[view.head] * LOG2_E).repeat(n).view(-1, 1)
        total += 1
    for scores, v, _ in view.blocks():
        new_top = torch.maximum(top, scores.amax(1, keepdim=True))
        weights, shrink = (scores - new_top).exp2(), (top - new_top).exp2()
        total, acc, top = total * shrink + weights.sum(1, keepdim=True), acc * shrink + weights @ v, new_top
    out.copy_((acc / total).view(out.shape))
    if lse is not None:
        lse.copy_((top + total.log2()).view(lse.shape))


def _weigh(view: _View, lse: torch.Tensor, mass_: torch.Tensor, giving: str) -> None:
    """Puts together in ``mass`` (tokens,) what queries with ``lse`` (n, groups) give."""
    n, groups = lse.shape
    seen = view.pages.tokens[view.sequence] + view.first + 1 + torch.arange(n).repeat_interleave(groups).view(-1, 1)
    if view.scoring.window is not None:
        seen = seen.clamp(max=view.scoring.window)
    for scores, _, places in view.blocks():
        weights = (scores - lse.reshape(-1, 1)).exp2()
        if giving == "sum":
            mass_[places] += weights.sum(0)
        elif giving == "max":
            mass_[places] = mass_[places].maximum(weights.amax(0))
        else:
            mass_[places] += (weights * seen >= 1).sum(0)


def append(pages: Pages, rows: Rows, k: torch.Tensor, v: torch.Tensor | None) -> None:
    for row, (sequence, position) in enumerate(rows.places[: len(k)].tolist()):
        for head in range(k.shape[1]):
            place = int(pages.lengths[sequence, head]) + position - int(pages.tokens[sequence])
            at = sequence, pages.table[sequence, head, place // PAGE], place % PAGE
            pages.keys[at] = k[row, head].to(pages.keys.dtype)
            if v is not None:
                pages.values[at] = v[row, head].to(pages.values.dtype)


def attend_rows(
    pages: Pages, rows: Rows, looking: Looking, out: torch.Tensor, lse: torch.Tensor | None, scoring: Scoring
) -> None:
    groups = out.shape[1] // pages.table.shape[1]
    for row, head, view in _views_of_rows(pages, rows, looking, scoring):
        heads = slice(head * groups, (head + 1) * groups)
        _fold(view, out[row : row + 1, heads], None if lse is None else lse[row : row + 1, heads])


def attend(
    pages: Pages,
    sequence: int,
    run: Run,
    start: int,
    looking: Looking,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    scoring: Scoring,
) -> None:
    kv_heads = pages.table.shape[1]
    groups = out.shape[1] // kv_heads
    for head in range(kv_heads):
        heads = slice(head * groups, (head + 1) * groups)
        view = _view_of_run(pages, sequence, head, run, start, looking, scoring)
        _fold(view, out[:, heads], None if lse is None else lse[:, heads])


def join(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    top = torch.maximum(lse, other_lse)
    own, others = (lse - top).exp2(), (other_lse - top).exp2()
    total = own + others
    found = other_lse > -torch.inf
    both = out * (own / total)[..., None] + other * (others / total)[..., None]
    out.copy_(torch.where(found[..., None], both, out))
    lse.copy_(torch.where(found, top + total.log2(), lse))


def project(x: torch.Tensor, matrices: torch.Tensor, out: torch.Tensor) -> None:
    of_heads = matrices.repeat_interleave(x.shape[1] // len(matrices), 0)
    for row, sums in zip(x, out, strict=True):  # each alone, so that its bits are its own
        sums.copy_((row[:, None] @ of_heads)[:, 0])


def weigh_rows(
    pages: Pages,
    rows: Rows,
    looking: Looking,
    lse: torch.Tensor,
    mass_: torch.Tensor,
    scoring: Scoring,
    giving: str,
    last: int,
) -> None:
    groups = lse.shape[1] // pages.table.shape[1]
    counts = (rows.places[:, 1] % PAGE + last >= PAGE).tolist()
    for row, head, view in _views_of_rows(pages, rows, looking, scoring):
        if counts[row]:
            of_head = lse[row : row + 1, head * groups : (head + 1) * groups]
            _weigh(view, of_head, mass_[view.sequence, head].view(-1), giving)


def weigh(
    pages: Pages,
    sequence: int,
    run: Run,
    start: int,
    looking: Looking,
    lse: torch.Tensor,
    mass_: torch.Tensor,
    scoring: Scoring,
    giving: str,
) -> None:
    groups = lse.shape[1] // pages.table.shape[1]
    for head in range(pages.table.shape[1]):
        view = _view_of_run(pages, sequence, head, run, start, looking, scoring)
        _weigh(view, lse[:, head * groups : (head + 1) * groups], mass_[head], giving)


# ---- what is kept ----


def keep(
    pages: Pages,
    sequence: int,
    run: Run,
    indices: torch.Tensor | None,
    counts: torch.Tensor | None,
    recent: int,
    resident: int,
    tail: int,
    step: int,
) -> None:
    before = pages.lengths[sequence].tolist()
    after = [length + run.count for length in before]
    listed = [None] * len(before) if indices is None or counts is None else list(indices)
    for head, count in enumerate([] if counts is None else counts.tolist()):
        if count < 0:
            listed[head] = None
        else:
            after[head] = count
    # Heads that shrink come first: their pages may be wanted by those that grow.
    for head in sorted(range(len(before)), key=lambda head: after[head] - before[head]):
        of_head = listed[head]
        kept = torch.arange(after[head]) if of_head is None else of_head[: after[head]].long()
        _keep_head(pages, sequence, head, run, kept, recent, resident, tail, step)


def _keep_head(
    pages: Pages,
    sequence: int,
    head: int,
    run: Run,
    kept: torch.Tensor,
    recent: int,
    resident: int,
    tail: int,
    step: int,
) -> None:
    at = sequence, head
    before, after = int(pages.lengths[at]), len(kept)
    has_codes, has_file = pages.coded_keys is not None, pages.file >= 0
    same = int((kept == torch.arange(after)).long().cumprod(0).sum())
    first = min(same, before) // PAGE  # from this page on tokens are others than before
    coded = max(after - recent, 0) // PAGE if has_codes else 0
    coded = max(coded, min(int(pages.coded[at]), first))
    whole, used = coded if has_codes else after // PAGE, -(-after // PAGE)
    cold = min(max(used - resident, 0), whole) // step * step if has_file else 0
    cold = max(cold, min(int(pages.cold[at]), first))

    def place(j: int) -> int:
        return FILE if j < cold else CODED if j < coded else DENSE

    changed = first  # from this page on numbers are others than before
    for j in range(min(int(pages.cold[at]), first), first):
        found = _where(pages, sequence, head, j)
        if found == CODED and place(j) == FILE:  # as it is
            _write(pages, sequence, head, j, _stored(pages, sequence, head, j, found))
            _release(pages, sequence, head, j)
        elif found != place(j):
            _store(pages, sequence, head, j, place(j), *_load(pages, sequence, head, j))
            if not pages.key_codec.dense or pages.channels is not None:
                changed = min(changed, j)
    # A token's place never lies behind where it was: what a page overwrites was read before.
    for j in range(first, used):
        tokens = kept[j * PAGE : (j + 1) * PAGE]
        k, v = _tokens(pages, sequence, head, tokens, run)
        last = int(tokens[tokens < before].amax()) if (tokens < before).any() else 0
        for read in range(j + 1, last // PAGE):  # those that are written may want them
            _release(pages, sequence, head, read)
        _store(pages, sequence, head, j, place(j), k, v)
    wanted = -(-(after + tail) // PAGE)
    for j in range(used, pages.table.shape[2]):
        if j >= wanted or _where(pages, sequence, head, j) == CODED:
            _release(pages, sequence, head, j)
    pages.lengths[at], pages.coded[at], pages.cold[at] = after, coded, cold
    for j in range(used, wanted):
        if pages.table[sequence, head, j] < 0:
            pages.table[sequence, head, j] = _take(pages.dense_free[sequence])
    bounds = pages.bounds_of(sequence, head)
    if bounds is not None:
        for j in range(min(changed, int(pages.bounded[at])), after // PAGE):
            keys = _load(pages, sequence, head, j)[0].unflatten(0, (bounds.shape[1], -1))  # (parts, tokens, key_dim)
            low, high = _outwards(keys.amin(1), -torch.inf, pages), _outwards(keys.amax(1), torch.inf, pages)
            bounds[j] = torch.stack([low, high], 1)
        pages.bounded[at] = after // PAGE


def _outwards(x: torch.Tensor, end: float, pages: Pages) -> torch.Tensor:
    """``x`` in the type of bounds, rounded towards ``end``."""
    rounded = x.to(pages.keys.dtype)
    inside = rounded.float() > x if end < 0 else rounded.float() < x
    return torch.where(inside, rounded.nextafter(torch.full_like(rounded, end)), rounded)


def read(
    pages: Pages, sequence: int, head: int, run: Run, start: int, stop: int, k: torch.Tensor, v: torch.Tensor
) -> None:
    for at in range(start, stop, BLOCK):
        places = torch.arange(at, min(at + BLOCK, stop))
        here = slice(at - start, at - start + len(places))
        k[here], v[here] = _tokens(pages, sequence, head, places, run)


def straighten(pages: Pages, sequence: int, path: torch.Tensor) -> None:
    for head in range(pages.table.shape[1]):
        length = int(pages.lengths[sequence, head])
        for i, order in enumerate(path.tolist()):  # a path ascends: nothing that is still wanted is overwritten
            (to, there), (source, here) = (divmod(length + place, PAGE) for place in (i, order))
            table = pages.table[sequence, head]
            pages.keys[sequence, table[to], there] = pages.keys[sequence, table[source], here]
            if not pages.shared:
                pages.values[sequence, table[to], there] = pages.values[sequence, table[source], here]


def shares(
    pages: Pages, sequence: int, q: torch.Tensor, until: torch.Tensor, shares_: torch.Tensor, scoring: Scoring
) -> None:
    for head, (queries, count) in enumerate(zip(q.unflatten(0, (len(until), -1)), until.tolist(), strict=True)):
        blocks = torch.arange(count).split(BLOCK)
        keys = [_tokens(pages, sequence, head, places)[0] @ queries.T for places in blocks]
        scores = torch.cat([*keys, torch.empty(0, len(queries))]) * scoring.scale
        if scoring.softcap is not None:
            scores = (scores / scoring.softcap).tanh() * scoring.softcap
        shares_[head, :count] = scores.softmax(0).sum(1)


def select(pages: Pages, rows: Rows, q: torch.Tensor, chosen: torch.Tensor) -> None:
    if pages.bounds is None:
        raise ValueError("pages without bounds cannot be selected")
    count = chosen.shape[2]
    for row, (sequence, _) in enumerate(rows.places[: len(q)].tolist()):
        for head, queries in enumerate(q[row].unflatten(0, (chosen.shape[1], -1))):
            chosen[row, head] = -1
            bounds = pages.bounds_of(sequence, head)
            if bounds is None:
                continue
            bounds = bounds[: pages.bounded[sequence, head]].float()
            sides = queries.view(-1, 1, 1, 1, queries.shape[-1]) * bounds  # (groups, pages, parts, 2, key_dim)
            largest = sides.amax(3).sum(-1).amax((0, 2))
            best = largest.sort(descending=True, stable=True).indices[:count].sort().values
            chosen[row, head, : len(best)] = best.int()


def rank(
    pages: Pages,
    rows: Rows,
    q: torch.Tensor,
    chosen: torch.Tensor,
    following: torch.Tensor,
    others: torch.Tensor,
) -> None:
    count, more = chosen.shape[2], following.shape[2]
    for row, (sequence, _) in enumerate(rows.places[: len(q)].tolist()):
        for head, queries in enumerate(q[row].unflatten(0, (chosen.shape[1], -1))):
            found = int(pages.coded[sequence, head])
            keys = [_load(pages, sequence, head, j)[0] for j in range(found)]
            scores = torch.stack([(queries @ page.T).amax() for page in keys]) if keys else torch.empty(0)
            order = scores.sort(descending=True, stable=True).indices
            for out, best in (
                (chosen, order[:count]),
                (following, order[count : count + more]),
                (others, order[count:]),
            ):
                out[row, head] = -1
                out[row, head, : len(best)] = best.sort().values.int()
