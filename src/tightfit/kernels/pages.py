"""Keys and values in pages, and attention over them: compiled where that was built, else in torch.

A page holds 32 tokens of one head. Dense pages hold them in the cache's own type; coded pages hold codes of 8, 4 or 2
bits, of keys with a scale and a minimum for each channel of a page, of values for each token and group of 32 channels
(the layout of KIVI, https://arxiv.org/abs/2402.02750), or what else a :class:`~tightfit.kernels.codec.Codec` says, or
with 16 bits and more, numbers as they are. Pages may also lie in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import cpu
from tightfit.kernels import pages_reference as reference
from tightfit.kernels.attention import KINDS, Scoring, _block, _run
from tightfit.kernels.codec import PAGE as PAGE
from tightfit.kernels.codec import Codec as Codec

EVERYTHING = 1 << 62
# How what queries give to a token is put together: its sum, the most that one gives, or how many give it at least what
# they would if they looked alike at all tokens that the model lets them see.
GIVINGS = ("sum", "max", "votes")


@dataclass(eq=False)
class Pages:
    """Pages of one layer. Of each sequence and head, ``lengths`` tokens are certain; page j of them is ``table[j]`` of
    the coded pages for j below ``coded``, of the dense ones from there on, or if j is below ``cold``, in the file.

    What a decoding step adds lies behind them, in dense pages, until it is certain too. ``tokens`` of each sequence
    were certain so far, those included that are no longer kept. Free pages are listed behind their number. The first
    ``bounded`` pages have ``bounds``: the lowest and the highest number of each channel of the keys of each of their
    parts. They may be for some heads alone.
    """

    keys: torch.Tensor  # (sequences, dense_pages, PAGE, key_dim)
    values: torch.Tensor  # (sequences, dense_pages, PAGE, value_dim), or the first features of the keys
    table: torch.Tensor  # (sequences, kv_heads, table_pages) int32
    lengths: torch.Tensor  # (sequences, kv_heads) int32, as coded, cold and bounded are
    coded: torch.Tensor
    cold: torch.Tensor
    bounded: torch.Tensor
    dense_free: torch.Tensor  # (sequences, 1 + dense_pages) int32
    coded_free: torch.Tensor
    tokens: torch.Tensor  # (sequences,) int32
    key_codec: Codec
    value_codec: Codec
    coded_keys: torch.Tensor | None = None  # (sequences, coded_pages, page_bytes) uint8
    coded_values: torch.Tensor | None = None
    positions: torch.Tensor | None = None  # (sequences, kv_heads, table_pages * PAGE) int32; None: token i is at i
    channels: torch.Tensor | None = None  # (sequences, kv_heads, key_codec.dim) int32, of keys that are coded
    bounds: torch.Tensor | None = None  # (sequences, heads with bounds, table_pages, parts, 2, key_dim)
    bound_at: torch.Tensor | None = None  # (kv_heads,) int32: which of those a head is, or -1; None: all have bounds
    file: int = -1
    keys_at: int = 0  # in the file
    values_at: int = 0
    key_side: torch.Tensor | None = None  # (sequences or 1, kv_heads, key_codec.side) float32, if it has a table
    value_side: torch.Tensor | None = None
    key_shape: tuple[int, int] = field(init=False)  # of one token
    value_shape: tuple[int, int] = field(init=False)
    handle: Any = field(init=False, default=None)
    staging: Staging | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        sequences, dense_pages, _, key_dim = self.keys.shape
        kv_heads, table_pages = self.table.shape[1:]
        value_dim = self.values.shape[3]
        self.key_shape, self.value_shape = (kv_heads, key_dim), (kv_heads, value_dim)
        if cpu.module is None:
            return
        coded_pages = 0 if self.coded_keys is None else self.coded_keys.shape[1]
        codes = _address(self.coded_keys), _address(self.coded_keys if self.shared else self.coded_values)
        lists = self.table, self.lengths, self.coded, self.cold, self.bounded, self.dense_free, self.coded_free
        self.handle = cpu.module.Pages(
            KINDS[self.keys.dtype],
            (sequences, kv_heads, key_dim, value_dim),
            (table_pages, dense_pages, coded_pages),
            (self.key_codec.arguments(), self.value_codec.arguments()),
            (self.keys.data_ptr(), self.values.data_ptr(), *codes),
            tuple(_address(tensor) for tensor in lists),
            self.tokens.data_ptr(),
            _address(self.positions),
            _address(self.channels),
            self._bounds,
            (self.file, self.keys_at, self.values_at),
            (*_tables(self.key_side), *_tables(self.value_side)),
        )

    @property
    def _bounds(self) -> tuple[int, int, int, int]:
        _, heads, _, parts, *_ = (0, 0, 0, 1) if self.bounds is None else self.bounds.shape
        return _address(self.bounds), heads, parts, _address(self.bound_at)

    def bounds_of(self, sequence: int, head: int) -> torch.Tensor | None:
        """The bounds (table_pages, parts, 2, key_dim) of a head's pages, if it has some."""
        at = head if self.bound_at is None else int(self.bound_at[head])
        return None if self.bounds is None or at < 0 else self.bounds[sequence, at]

    @property
    def shared(self) -> bool:
        """Whether values are part of the keys."""
        return self.values.data_ptr() == self.keys.data_ptr()

    def file_places(self, sequence: int, head: int, j: int) -> list[tuple[int, int]]:
        """Where the keys and the values of a page are in the file, and how many bytes they take."""
        kv_heads, table_pages = self.table.shape[1:]
        page = (sequence * kv_heads + head) * table_pages + j
        places = [(self.keys_at, self.key_codec.page_bytes), (self.values_at, self.value_codec.page_bytes)]
        return [(at + page * nbytes, nbytes) for at, nbytes in places[: 1 if self.shared else 2]]

    @property
    def tables(self) -> list[torch.Tensor]:
        """The tables of codecs that each sequence has for itself."""
        both = (self.key_codec, self.key_side), (self.value_codec, self.value_side)
        return [side for codec, side in both if side is not None and not codec.coupled]

    def reset(self, sequence: int) -> None:
        """Lets go of everything of a sequence."""
        if self.staging is not None:
            self.handle.forget(sequence)
        for codec, side in ((self.key_codec, self.key_side), (self.value_codec, self.value_side)):
            if side is not None and not codec.coupled:
                side[sequence] = 0.0
                side[sequence, :, codec.dim : 2 * codec.dim * codec.affine] = 1.0  # factors
        for counts in (self.lengths, self.coded, self.cold, self.bounded):
            counts[sequence] = 0
        self.table[sequence] = -1
        for free in (self.dense_free, self.coded_free):
            pages = free.shape[1] - 1
            free[sequence, 0] = pages
            free[sequence, 1:] = torch.arange(pages - 1, -1, -1)


class Counts(NamedTuple):
    """What was wanted of the file, heads or pages, how many of them had been asked for before they were wanted, the
    bytes that were read, and the nanoseconds for which attention waited for them."""

    wanted: int
    ahead: int
    bytes: int
    waited: int


class Staging:
    """Brings what lies in the file into ``memory``, ahead of its use, by a thread of its own. Without the compiled
    library there is none: pages are read when they are wanted."""

    def __init__(self, handle: Any, *memory: torch.Tensor) -> None:
        self.memory, self.handle = memory, handle

    @property
    def counts(self) -> Counts:
        return Counts(*self.handle.counts())

    def rest(self) -> None:
        """Returns when nothing is being read."""
        self.handle.rest()


def stage_heads(layers: Sequence[Pages], heads: int, memory: torch.Tensor) -> list[Staging]:
    """Has the pages that ``layers`` have in files brought into memory head by head, in this order and then from the
    first layer on: of each head that is looked at all of them, and of the ``heads`` - 1 that come next.

    ``memory`` has ``heads`` times :func:`head_bytes` of the largest layer.
    """
    if cpu.module is None:
        return []
    sizes = max(head_bytes(pages) for pages in layers), heads, max(pages.table.shape[2] for pages in layers)
    staging = Staging(cpu.module.HeadStaging(cpu.module.Reader(), memory.data_ptr(), *sizes), memory)
    for pages, following in zip(layers, [*layers[1:], layers[0]], strict=True):
        pages.handle.stage(staging.handle, following.handle)
        pages.staging = staging
    return [staging]


def stage_pages(layers: Sequence[Pages], places: int, arena: Arena) -> list[Staging]:
    """Has the pages that rows choose in ``layers`` brought into memory in ``arena``, where each head of each sequence
    has ``places`` pages: those that were wanted last, and those that :func:`prefetch` is told of."""
    made, reader = [], None if cpu.module is None else cpu.module.Reader()
    for pages in layers:
        lists, table_pages = pages.table.shape[0] * pages.table.shape[1], pages.table.shape[2]
        memory = arena.take(lists * places * head_bytes(pages) // table_pages)
        staged = arena.take(lists * table_pages * 4)
        if reader is None:
            continue
        addresses = memory.data_ptr(), staged.data_ptr()
        pages.staging = Staging(cpu.module.PageStaging(reader, *addresses, lists, table_pages, places), memory, staged)
        pages.handle.stage(pages.staging.handle, pages.handle)
        made.append(pages.staging)
    return made


def prefetch(pages: Pages, rows: Rows, wanted: torch.Tensor) -> None:
    """Asks for pages that the next rows may choose, ``wanted`` (n, kv_heads, count) int32, then -1: as many as have a
    place beside those that were chosen last. Does nothing where nothing is staged."""
    if pages.staging is not None and cpu.available():
        n, _, count = wanted.shape
        _run(pages.staging.handle.prefetch, pages.handle, rows.arguments(), n, wanted.data_ptr(), count)


def head_bytes(pages: Pages) -> int:
    """Bytes that one head has in the file, at most."""
    return pages.table.shape[2] * sum(nbytes for _, nbytes in pages.file_places(0, 0, 0))


@dataclass(frozen=True)
class Run:
    """Keys and values (kv_heads, slots, dim) of ``count`` tokens behind the certain ones, in the type of dense pages.
    Values may be the first features of keys."""

    keys: torch.Tensor
    values: torch.Tensor
    count: int

    def arguments(self) -> tuple[int, int, int, int]:
        slots = self.keys.stride(0) // self.keys.shape[2]
        return self.keys.data_ptr(), self.values.data_ptr(), slots, self.count

    def part(self, start: int, stop: int) -> Run:
        """Some of its tokens."""
        return Run(self.keys[:, start:], self.values[:, start:], stop - start)


class Rows(NamedTuple):
    """Tokens that decode. ``places`` (n or more, 2) int32: sequence, and place counted from the first token ever;
    ``paths`` (n, depth) int32: of nodes of trees the tokens from the root on, counted from the certain ones, then
    -1."""

    places: torch.Tensor
    paths: torch.Tensor | None = None

    def arguments(self) -> tuple[int, int, int]:
        if self.places.dtype is not torch.int32 or not self.places.is_contiguous():
            raise ValueError(f"expected int32 places, found {self.places.dtype} {tuple(self.places.shape)}")
        stride = 0 if self.paths is None else self.paths.shape[1]
        return self.places.data_ptr(), _address(self.paths), stride


class Looking(NamedTuple):
    """How queries ``q`` (n, heads, key_dim) look at pages. The first ``anchors`` tokens are always seen, by
    ``anchor_q`` if given: queries that are turned otherwise.

    A row that decodes sees of the pages that have bounds only those in ``chosen`` (n, kv_heads, pages) int32, in order
    and then -1, if given; or of the certain tokens before ``since`` (n, kv_heads) int32 only those in ``listed``
    (n, kv_heads, m) int32, ascending and then -1. Then no token is an anchor, and none is hidden by a window. With
    ``certain`` nothing else is seen: neither what decodes, a row's own token included, nor a run.
    """

    q: torch.Tensor
    anchor_q: torch.Tensor | None = None
    anchors: int = 0
    chosen: torch.Tensor | None = None
    listed: torch.Tensor | None = None
    since: torch.Tensor | None = None
    certain: bool = False

    def part(self, start: int, stop: int | None) -> Looking:
        """How some queries look that see everything."""
        turned = None if self.anchor_q is None else self.anchor_q[start:stop]
        return Looking(self.q[start:stop], turned, self.anchors, certain=self.certain)


def append(pages: Pages, rows: Rows, k: torch.Tensor, v: torch.Tensor | None) -> None:
    """Writes ``k`` (n, kv_heads, key_dim) and ``v`` behind the certain tokens."""
    tokens = k.shape[0]
    if not cpu.available():
        _run(reference.append, pages, rows, k, v)
        return
    values = (0, 0, 0) if v is None else _block(v, (tokens, *pages.value_shape))
    key = _block(k, (tokens, *pages.key_shape))
    _run(pages.handle.append, rows.arguments(), tokens, key, values, cpu.threads())


def attend_rows(
    pages: Pages,
    rows: Rows,
    looking: Looking,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    ws: Workspace,
    scoring: Scoring,
) -> None:
    """Attention of rows that decode, each alone, into ``out`` (n, heads, value_dim); and of each row and head into
    ``lse`` (n, heads) the logarithm to base 2 of what its softmax divides by: minus infinity where it sees nothing."""
    count, heads, _ = looking.q.shape
    if not cpu.available():
        _run(reference.attend_rows, pages, rows, looking, out, lse, scoring)
        return
    _call(
        ws,
        pages.handle.attend_rows_scratch(count, heads, cpu.threads()),
        pages.handle.attend_rows,
        rows.arguments(),
        count,
        _views(pages, looking),
        _block(out, (count, heads, pages.value_shape[1])),
        _rows(lse),
        (heads, *scoring.arguments()),
    )


def attend(
    pages: Pages,
    sequence: int,
    run: Run,
    start: int,
    looking: Looking,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    ws: Workspace,
    scoring: Scoring,
    bf16: bool = False,
) -> None:
    """:func:`attend_rows` for tokens ``start`` onwards of a run, which see what is certain and the run up to their own.

    ``bf16`` allows products in bfloat16, as in :func:`tightfit.kernels.attention.attend`.
    """
    count, heads, _ = looking.q.shape
    if not cpu.available():
        _run(reference.attend, pages, sequence, run, start, looking, out, lse, scoring)
        return
    _call(
        ws,
        pages.handle.attend_scratch(count, heads, bf16, cpu.threads()),
        pages.handle.attend,
        sequence,
        run.arguments(),
        start,
        count,
        _views(pages, looking),
        _block(out, (count, heads, pages.value_shape[1])),
        _rows(lse),
        (heads, *scoring.arguments()),
        bf16,
    )


def join(out_: torch.Tensor, lse_: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """Makes of attention over two sets of tokens, ``out`` and ``other`` (n, heads, value_dim) with their ``lse`` (n,
    heads), that over both."""
    if not cpu.available():
        _run(reference.join, out_, lse_, other, other_lse)
        return
    shape = out_.shape
    _run(cpu.module.join, _block(out_, shape), _rows(lse_), _block(other, shape), _rows(other_lse), *shape)


def project(x: torch.Tensor, matrices: torch.Tensor, out: torch.Tensor) -> None:
    """``out`` (n, heads, m) = ``x`` (n, heads, dim) times that of ``matrices`` (kv_heads, dim, m) float32 of each
    head's group. A row's bits do not depend on the others."""
    if not cpu.available():
        _run(reference.project, x, matrices, out)
        return
    shape = tuple(matrices.shape)
    blocks = _block(x, x.shape), _block(out, out.shape)
    _run(cpu.module.project, blocks[0], *x.shape[:2], matrices.data_ptr(), shape, blocks[1], cpu.threads())


def weigh_rows(
    pages: Pages,
    rows: Rows,
    looking: Looking,
    lse: torch.Tensor,
    mass_: torch.Tensor,
    ws: Workspace,
    scoring: Scoring,
    giving: str = "sum",
    last: int = PAGE,
) -> None:
    """Puts together in ``mass`` (sequences, kv_heads, ...), whose heads begin with as many numbers as they can have
    tokens, what the rows of :func:`attend_rows` give to each token: one of :data:`GIVINGS`. Only the ``last`` of each
    32 places of a sequence count."""
    count, heads, _ = looking.q.shape
    if not cpu.available():
        _run(reference.weigh_rows, pages, rows, looking, lse, mass_, scoring, giving, last)
        return
    _call(
        ws,
        pages.handle.weigh_scratch(count, heads, cpu.threads()),
        pages.handle.weigh_rows,
        rows.arguments(),
        count,
        _views(pages, looking),
        _rows(lse),
        (heads, *scoring.arguments()),
        GIVINGS.index(giving),
        last,
        (mass_.data_ptr(), mass_.stride(1)),
    )


def weigh(
    pages: Pages,
    sequence: int,
    run: Run,
    start: int,
    looking: Looking,
    lse: torch.Tensor,
    mass_: torch.Tensor,
    ws: Workspace,
    scoring: Scoring,
    giving: str = "sum",
) -> None:
    """Puts together in ``mass`` (kv_heads, tokens) what the tokens of :func:`attend` give to those that are certain,
    then to those of the run: one of :data:`GIVINGS`."""
    count, heads, _ = looking.q.shape
    if not cpu.available():
        _run(reference.weigh, pages, sequence, run, start, looking, lse, mass_, scoring, giving)
        return
    _call(
        ws,
        pages.handle.weigh_scratch(count, heads, cpu.threads()),
        pages.handle.weigh,
        sequence,
        run.arguments(),
        start,
        count,
        _views(pages, looking),
        _rows(lse),
        (heads, *scoring.arguments()),
        GIVINGS.index(giving),
        (mass_.data_ptr(), mass_.stride(0)),
    )


def keep(
    pages: Pages,
    sequence: int,
    run: Run,
    ws: Workspace,
    indices: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    recent: int = 0,
    resident: int = EVERYTHING,
    tail: int = 1,
    step: int = 1,
) -> None:
    """What happens when tokens become certain: those of ``run`` are added; all but the first ``counts`` (kv_heads,)
    int32 of ``indices`` (kv_heads, n) int32 are let go, if given (those that are in pages ascend, and none stands
    further back than it was; those of the run may stand anywhere; of a head with a count of -1 all stay); where pages
    have codes all but the last ``recent`` tokens are coded, page by page; all but ``resident`` pages of each head go to
    the file, ``step`` at a time. There is room for ``tail`` more tokens afterwards.

    Pages are written anew from the first on that changes: keys are then rounded again, with those that are new beside
    them.
    """
    if not cpu.available():
        _run(reference.keep, pages, sequence, run, indices, counts, recent, resident, tail, step)
        return
    with ws.frame():
        scratch = ws.empty(pages.handle.keep_scratch(), dtype=torch.uint8)
        stride = 0 if indices is None else indices.stride(0)
        lists = _address(indices), stride, _address(counts)
        _run(pages.handle.keep, sequence, run.arguments(), *lists, recent, resident, step, tail, scratch.data_ptr())


def read(
    pages: Pages, sequence: int, head: int, run: Run, start: int, stop: int, ws: Workspace
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (n, key_dim) and values (n, value_dim) in float32 of a head's tokens ``start`` to ``stop``, those of the run
    behind those that are certain, in scratch memory of the enclosing frame."""
    count = stop - start
    k, v = ws.empty(count, pages.key_shape[1]), ws.empty(count, pages.value_shape[1])
    if not cpu.available():
        _run(reference.read, pages, sequence, head, run, start, stop, k, v)
    else:
        with ws.frame():
            scratch = ws.empty(pages.handle.keep_scratch(), dtype=torch.uint8)
            addresses = k.data_ptr(), v.data_ptr(), scratch.data_ptr()
            _run(pages.handle.read, sequence, head, run.arguments(), start, stop, *addresses)
    return k, v


def straighten(pages: Pages, sequence: int, path: torch.Tensor) -> None:
    """Makes the tokens behind the certain ones those that ``path`` (n,) int32 names, ascending."""
    if not cpu.available():
        _run(reference.straighten, pages, sequence, path)
        return
    _run(pages.handle.straighten, sequence, path.data_ptr(), len(path))


def select(pages: Pages, rows: Rows, q: torch.Tensor, chosen: torch.Tensor, ws: Workspace) -> None:
    """Writes into ``chosen`` (n, kv_heads, count) int32 the pages that may hold the largest scores of any query of each
    key-value head, by the bounds of their keys, in order, then -1. Of heads without bounds there are none."""
    rows_count, heads, _ = q.shape
    if not cpu.available():
        _run(reference.select, pages, rows, q, chosen)
        return
    _call(
        ws,
        pages.handle.select_scratch(cpu.threads()),
        pages.handle.select,
        rows.arguments(),
        rows_count,
        _block(q, (rows_count, heads, pages.key_shape[1])),
        heads,
        chosen.shape[2],
        chosen.data_ptr(),
    )


def select_scratch(pages: Pages, ws: Workspace) -> torch.Tensor:
    """Scratch memory of the enclosing frame for :func:`select_in_op`."""
    nbytes = pages.handle.select_scratch(cpu.threads()) if cpu.available() else 0
    return ws.empty(nbytes, dtype=torch.uint8)


def select_in_op(pages: Pages, rows: Rows, q: torch.Tensor, chosen_: torch.Tensor, scratch_: torch.Tensor) -> None:
    """:func:`select` for use in operations, of which it is none."""
    if not cpu.available():
        reference.select(pages, rows, q, chosen_)
        return
    rows_count, heads, _ = q.shape
    block = _block(q, (rows_count, heads, pages.key_shape[1]))
    addresses = chosen_.data_ptr(), scratch_.data_ptr(), cpu.threads()
    pages.handle.select(rows.arguments(), rows_count, block, heads, chosen_.shape[2], *addresses)


def rank(
    pages: Pages,
    rows: Rows,
    q: torch.Tensor,
    chosen: torch.Tensor,
    following: torch.Tensor,
    others: torch.Tensor,
    ws: Workspace,
) -> None:
    """Ranks the coded pages of each row's sequence by the largest score of any of their keys with any query of a
    key-value head: the best go into ``chosen`` (n, kv_heads, count) int32, the next best into ``following`` (n,
    kv_heads, more), and all but the best into ``others`` (n, kv_heads, table_pages), each in order and then -1."""
    count, heads, _ = q.shape
    if others.shape != (count, *pages.table.shape[1:]):
        raise ValueError(f"expected {(count, *pages.table.shape[1:])} pages that are not chosen, found {others.shape}")
    if not cpu.available():
        _run(reference.rank, pages, rows, q, chosen, following, others)
        return
    _call(
        ws,
        pages.handle.rank_scratch(cpu.threads()),
        pages.handle.rank,
        rows.arguments(),
        count,
        _block(q, (count, heads, pages.key_shape[1])),
        heads,
        (chosen.data_ptr(), chosen.shape[2]),
        (following.data_ptr(), following.shape[2]),
        others.data_ptr(),
    )


def shares_scratch(pages: Pages, heads: int, ws: Workspace) -> torch.Tensor:
    """Scratch memory of the enclosing frame for :func:`shares`."""
    nbytes = pages.handle.shares_scratch(heads, cpu.threads()) if cpu.available() else 0
    return ws.empty(nbytes, dtype=torch.uint8)


def shares(
    pages: Pages,
    sequence: int,
    q: torch.Tensor,
    until: torch.Tensor,
    shares_: torch.Tensor,
    scratch_: torch.Tensor,
    scoring: Scoring,
) -> None:
    """Writes into ``shares`` (kv_heads, n) what a query ``q`` (heads, key_dim) would give to each of the first
    ``until`` (kv_heads,) int32 tokens of a sequence if these were all, summed over the heads of a group. For use in
    operations, of which it is none."""
    if not cpu.available():
        reference.shares(pages, sequence, q, until, shares_, scoring)
        return
    heads = len(q)
    block = _block(q.unsqueeze(0), (1, heads, pages.key_shape[1]))
    addresses = until.data_ptr(), _rows(shares_), scratch_.data_ptr(), cpu.threads()
    pages.handle.shares(sequence, block, (heads, *scoring.arguments()), *addresses)


def _call(ws: Workspace, nbytes: int, kernel: Callable[..., None], *arguments: Any) -> None:
    """Runs a kernel that takes scratch memory and a number of threads."""
    with ws.frame():
        scratch = ws.empty(nbytes, dtype=torch.uint8)
        _run(kernel, *arguments, scratch.data_ptr(), cpu.threads())


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _tables(side: torch.Tensor | None) -> tuple[int, int]:
    return (0, 1) if side is None else (side.data_ptr(), side.shape[0])


def _rows(x: torch.Tensor | None) -> tuple[int, int]:
    if x is None:
        return 0, 0
    if x.dtype is not torch.float32 or x.stride(-1) != 1:
        raise ValueError(f"expected float32 rows without gaps, found {x.dtype} with strides {x.stride()}")
    return x.data_ptr(), x.stride(0)


def _views(pages: Pages, looking: Looking) -> tuple[Any, ...]:
    count, heads, _ = looking.q.shape
    shape = count, heads, pages.key_shape[1]
    turned = (0, 0, 0) if looking.anchor_q is None else _block(looking.anchor_q, shape)
    chosen = looking.chosen if looking.since is None else looking.listed
    some = (0, 0) if chosen is None else (chosen.data_ptr(), chosen.shape[2])
    return _block(looking.q, shape), turned, looking.anchors, *some, _address(looking.since), looking.certain
