"""Attention over cached keys and values, and what writes them: compiled where that was built, else in torch.

What a token gets depends on its own query and the keys that it sees only, not on the other tokens of the call nor on
threads: keys are taken in blocks at fixed positions and combined in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import attention_reference as reference
from tightfit.kernels import cpu, ops
from tightfit.kernels.ops import op

KINDS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
ALL = 1 << 62  # a window that hides nothing


@dataclass(eq=False)
class KeysValues:
    """``keys`` (sequences, kv_heads, slots, key_dim) and ``values`` (sequences, kv_heads, slots, value_dim) of a layer.

    Both are float32, float16 or bfloat16 and contiguous, unless ``values`` are the first features of ``keys``. The
    token at position p lies in slot ``p % slots``.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_shape: tuple[int, int] = field(init=False)  # of one token
    value_shape: tuple[int, int] = field(init=False)
    handle: Any = field(init=False)  # the compiled kernels' view of both

    def __post_init__(self) -> None:
        sequences, kv_heads, slots, key_dim = self.keys.shape
        value_dim = self.values.shape[3]
        self.key_shape, self.value_shape = (kv_heads, key_dim), (kv_heads, value_dim)
        if cpu.module is not None:
            kind, keys, values = KINDS[self.keys.dtype], self.keys.data_ptr(), self.values.data_ptr()
            sizes = sequences, kv_heads, slots, key_dim, value_dim
            self.handle = cpu.module.KeysValues(kind, keys, values, *sizes)


class Scoring(NamedTuple):
    """How queries look at keys: scores are ``q . k * scale``.

    ``window``: how many keys a query sees, its own included. ``softcap`` limits the scores (Gemma 2); ``sinks``
    (heads,) are logits that take part in the sum only (gpt-oss).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def arguments(self) -> tuple[float, int, float, int]:
        """What the compiled kernels take."""
        sinks = 0 if self.sinks is None else self.sinks.data_ptr()
        return self.scale, self.window or ALL, self.softcap or 0.0, sinks


def rotate_(x_: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, ws: Workspace) -> None:
    """Rotates the first ``2 * cos.shape[-1]`` features of ``x`` (tokens, heads, features) in place.

    ``cos`` and ``sin`` (tokens, features / 2) are those of the angles by which pairs of features turn: the i-th of each
    half, or neighbours if ``interleaved``.
    """
    tokens, heads, features = x_.shape
    if cpu.available():
        tables = _tables(cos, sin, tokens, features)
        _run(cpu.module.rotate, *_block(x_, x_.shape), tokens, heads, *tables, interleaved, cpu.threads())
        return
    with ws.frame():
        a, b = ws.empty(2, tokens, heads, cos.shape[-1])
        ops.rotate_(x_, cos, sin, interleaved, a, b)


def append(cache: KeysValues, places: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None) -> None:
    """Keeps ``k`` (n, kv_heads, key_dim) and ``v`` (n, kv_heads, value_dim) at ``places`` (n, 2) int32: sequences and
    positions. No ``v`` where values are a view of keys."""
    if not cpu.available():
        _run(reference.append, cache.keys, cache.values, places, k, v)
        return
    tokens = k.shape[0]
    _run(
        cache.handle.append,
        _places(places, tokens),
        tokens,
        *_block(k, (tokens, *cache.key_shape)),
        *((0, 0, 0) if v is None else _block(v, (tokens, *cache.value_shape))),
        cpu.threads(),
    )


def rotate_append(
    cache: KeysValues,
    places: torch.Tensor,
    q_: torch.Tensor,
    k_: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    ws: Workspace,
) -> None:
    """:func:`rotate_` of ``q`` and ``k``, and :func:`append` of ``k`` and ``v``, in one call."""
    if not cpu.available():
        rotate_(q_, cos, sin, interleaved, ws)
        rotate_(k_, cos, sin, interleaved, ws)
        append(cache, places, k_, v)
        return
    tokens, heads, features = q_.shape
    _run(
        cache.handle.rotate_append,
        _places(places, tokens),
        tokens,
        *_block(q_, (tokens, heads, cache.key_shape[1])),
        heads,
        *_block(k_, (tokens, *cache.key_shape)),
        *_block(v, (tokens, *cache.value_shape)),
        *_tables(cos, sin, tokens, features),
        interleaved,
        cpu.threads(),
    )


def move(cache: KeysValues, sequence: int, source: int, target: int) -> None:
    """The token at ``target`` becomes a copy of that at ``source``."""
    if not cpu.available():
        slots = cache.keys.shape[2]
        for kept in (cache.keys, cache.values):
            kept[sequence, :, target % slots] = kept[sequence, :, source % slots]
        return
    _run(cache.handle.move, sequence, source, target)


def attend_rows(
    cache: KeysValues,
    places: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    ws: Workspace,
    scoring: Scoring,
    trees: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Attention of ``q`` (n, heads, key_dim), each row alone over the sequence and up to the place that ``places``
    (n or more, 2) names, into ``out`` (n, heads, value_dim); in float32, whatever the cache's type.

    ``trees`` are for rows that are nodes of trees: the paths (n, depth) int32, of each row the tokens from the root on,
    counted from the first that is not certain yet, then -1; and those first ones (n,) int64. A row then sees what is
    certain and its path.

    Raises ValueError for a row that sees more than the cache keeps.
    """
    rows, heads, _ = q.shape
    if not cpu.available():
        for row, (sequence, position) in enumerate(places[:rows].tolist()):
            one, keys, values = slice(row, row + 1), cache.keys[sequence], cache.values[sequence]
            if trees is not None:
                keys, values, position = _along(keys, values, trees[0][row], int(trees[1][row]))
            reference.attend(q[one], keys, values, position, out[one], ws, *scoring)
        return
    paths, committed = (None, None) if trees is None else trees
    with ws.frame():
        scratch = ws.empty(cache.handle.attend_rows_scratch(rows, heads, cpu.threads()), dtype=torch.uint8)
        _run(
            cache.handle.attend_rows,
            _places(places, rows),
            0 if paths is None else paths.data_ptr(),
            0 if paths is None else paths.shape[1],
            0 if committed is None else committed.data_ptr(),
            rows,
            *_block(q, (rows, heads, cache.key_shape[1])),
            heads,
            *_block(out, (rows, heads, cache.value_shape[1])),
            *scoring.arguments(),
            scratch.data_ptr(),
            cpu.threads(),
        )


def attend(
    cache: KeysValues,
    sequence: int,
    start: int,
    q: torch.Tensor,
    out: torch.Tensor,
    ws: Workspace,
    scoring: Scoring,
    bf16: bool = False,
) -> None:
    """:func:`attend_rows` for consecutive positions of one sequence, from ``start`` on.

    ``bf16`` allows products in bfloat16, summed in float32, where the processor has AMX: several times faster.
    """
    count, heads, _ = q.shape
    if not cpu.available():
        reference.attend(q, cache.keys[sequence], cache.values[sequence], start, out, ws, *scoring)
        return
    with ws.frame():
        scratch = ws.empty(cache.handle.attend_scratch(count, heads, bf16, cpu.threads()), dtype=torch.uint8)
        _run(
            cache.handle.attend,
            sequence,
            start,
            count,
            *_block(q, (count, heads, cache.key_shape[1])),
            heads,
            *_block(out, (count, heads, cache.value_shape[1])),
            *scoring.arguments(),
            bf16,
            scratch.data_ptr(),
            cpu.threads(),
        )


def _along(
    keys: torch.Tensor, values: torch.Tensor, path: torch.Tensor, committed: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Keys and values as a node of a tree sees them, one behind the other, and its position."""
    tail = path[path >= 0].long()
    stop = committed + len(tail)
    first = max(0, stop - keys.shape[1])
    places = torch.cat([torch.arange(first, committed), committed + tail]) % keys.shape[1]
    ring = torch.arange(first, stop) % keys.shape[1]
    copies = []
    for kept in (keys, values):
        copy = torch.zeros_like(kept)
        copy[:, ring] = kept[:, places]
        copies.append(copy)
    return copies[0], copies[1], stop - 1


@op
def _run(kernel: Callable[..., None], *arguments: Any) -> None:
    kernel(*arguments)


def _block(x: torch.Tensor, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Address and strides of tokens and heads of ``x`` (tokens, heads, features). Compiled kernels rely on what is
    checked here."""
    if x.shape != shape or x.dtype is not torch.float32 or x.stride(2) != 1:
        raise ValueError(
            f"expected float32 {tuple(shape)} without gaps in a head, found {x.dtype} {tuple(x.shape)} with strides "
            f"{x.stride()}"
        )
    return x.data_ptr(), x.stride(0), x.stride(1)


def _tables(cos: torch.Tensor, sin: torch.Tensor, tokens: int, features: int) -> tuple[int, int, int, int]:
    """Addresses of a rotation's cosines and sines (tokens, half), their stride, and half."""
    half = cos.shape[1]
    if cos.shape[0] != tokens or 2 * half > features or sin.shape != cos.shape or sin.stride() != cos.stride():
        raise ValueError(
            f"expected cosines and sines for {tokens} tokens of at most {features} features, found "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    return cos.data_ptr(), sin.data_ptr(), cos.stride(0), half


def _places(places: torch.Tensor, rows: int) -> int:
    if places.dtype is not torch.int32 or places.shape[0] < rows or not places.is_contiguous():
        raise ValueError(f"expected int32 places of {rows} rows, found {places.dtype} {tuple(places.shape)}")
    return places.data_ptr()
