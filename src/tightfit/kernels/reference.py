"""Torch references of the small operations of a decoder: short, obviously right, writing where they are told to.

Rows never influence each other's bits: an operation that calls a transcendental function is applied to ``parts`` of
the rows (each decoding row alone, each prefill segment alone), because vectorised libraries may round the last few
elements of a call differently.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

Parts = Iterable[tuple[int, int]]

# Softmax is computed with powers of two: torch's exp is up to a hundred times slower where its result is tiny or zero
# (below -87), which masks and sharp attention reach; exp2 is not.
LOG2_E = math.log2(math.e)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """``out = x / rms(x) * weight`` over the last dimension (https://arxiv.org/abs/1910.07467); it may be ``x``."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    torch.mul(x, rstd, out=out)
    out.mul_(weight)


def add_(x_: torch.Tensor, y: torch.Tensor, scale: float = 1.0) -> None:
    """``x += scale * y``"""
    x_.add_(y, alpha=scale)


def scale_(x_: torch.Tensor, scale: float) -> None:
    """``x *= scale``"""
    x_.mul_(scale)


def clamp_(x_: torch.Tensor, limit: float) -> None:
    """Limits ``x`` to ``[-limit, limit]``."""
    x_.clamp_(-limit, limit)


def softcap_(x_: torch.Tensor, cap: float, parts: Parts) -> None:
    """``x = cap * tanh(x / cap)``, row by part of rows."""
    for start, stop in parts:
        x_[start:stop].div_(cap).tanh_().mul_(cap)


def glu(gate_: torch.Tensor, up_: torch.Tensor, activation: str, out: torch.Tensor, parts: Parts) -> None:
    """``out = activation(gate) * up`` on (rows, features); ``gate`` and ``up`` are used as scratch, ``out`` may be
    ``gate``.

    ``clamped_swiglu`` is gpt-oss': gate limited above by 7, up to within 7 of zero, ``gate * sigmoid(1.702 gate) *
    (up + 1)``.
    """
    for start, stop in parts:
        gate, up = gate_[start:stop], up_[start:stop]
        if activation == "silu":
            torch.nn.functional.silu(gate, inplace=True)
        elif activation == "gelu":
            torch.ops.aten.gelu_(gate)
        elif activation == "gelu_pytorch_tanh":
            torch.ops.aten.gelu_(gate, approximate="tanh")
        elif activation == "relu":
            gate.relu_()
        elif activation == "clamped_swiglu":
            gate.clamp_(max=7.0)
            up.clamp_(-7.0, 7.0).add_(1.0)
            up.mul_(gate)
            gate.mul_(1.702).sigmoid_()
        else:
            raise ValueError(f"unknown activation {activation!r}")
    torch.mul(gate_, up_, out=out)


def rotation(
    positions: torch.Tensor, inv_freq: torch.Tensor, scaling: float, cos: torch.Tensor, sin: torch.Tensor
) -> None:
    """Fills ``cos`` and ``sin`` (tokens, dim/2) with those of ``positions * inv_freq``, times ``scaling``."""
    torch.mul(positions.unsqueeze(1), inv_freq, out=sin)
    torch.cos(sin, out=cos)
    sin.sin_()
    if scaling != 1.0:
        cos.mul_(scaling)
        sin.mul_(scaling)


def rotate_(
    x_: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, a: torch.Tensor, b: torch.Tensor
) -> None:
    """Rotates the first ``2 * cos.shape[-1]`` features of ``x`` (tokens, heads, features) in place.

    ``a`` and ``b`` are scratch of shape (tokens, heads, cos.shape[-1]).
    """
    half = cos.shape[-1]
    if interleaved:
        first, second = x_[..., 0 : 2 * half : 2], x_[..., 1 : 2 * half : 2]
    else:
        first, second = x_[..., :half], x_[..., half : 2 * half]
    cos, sin = cos[:, None], sin[:, None]
    torch.mul(first, sin, out=a)
    torch.mul(second, sin, out=b)
    first.mul_(cos).sub_(b)
    second.mul_(cos).add_(a)


def gather_rows(x: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """``out = x[rows]``"""
    torch.index_select(x, 0, rows, out=out)


def copy_(x_: torch.Tensor, y: torch.Tensor) -> None:
    """``x = y``, converted to the type of ``x``."""
    x_.copy_(y)


def load_queries(
    q: torch.Tensor, scale: float, query: torch.Tensor, top: torch.Tensor, total: torch.Tensor, acc: torch.Tensor
) -> None:
    """Starts a fold: ``query`` (kv_heads, groups * n, dim) is ``q`` (n, heads, dim) times ``scale`` and log2(e).

    The maximum starts low but finite, so that a query that sees no key of a block adds nothing.
    """
    n, heads, dim = q.shape
    kv_heads = query.shape[0]
    grouped = q.view(n, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
    torch.mul(grouped, scale * LOG2_E, out=query.view(kv_heads, heads // kv_heads, n, dim))
    top.fill_(torch.finfo(torch.float32).min)
    total.zero_()
    acc.zero_()


def fold_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    softcap: float | None,
    scores: torch.Tensor,
    top_: torch.Tensor,
    total_: torch.Tensor,
    acc_: torch.Tensor,
    new_top: torch.Tensor,
    part: torch.Tensor,
) -> None:
    """Folds one block of keys into the running (maximum, sum, output) of a softmax (online softmax, as FlashAttention).

    ``q`` (kv_heads, groups * n, key_dim) as :func:`load_queries` makes it; ``k`` (kv_heads, block, key_dim); ``v``
    (kv_heads, block, value_dim); ``mask`` (n, block), true where a query may not look. ``scores`` (kv_heads,
    groups * n, block), ``part`` and ``acc_`` (kv_heads, groups * n, value_dim); ``top_``, ``new_top`` and ``total_``
    (kv_heads, groups * n, 1).
    """
    torch.bmm(q, k.transpose(1, 2), out=scores)
    if softcap is not None:
        cap = softcap * LOG2_E
        scores.div_(cap).tanh_().mul_(cap)
    if mask is not None:
        n, block = mask.shape
        scores.view(scores.shape[0], -1, n, block).masked_fill_(mask, -torch.inf)
    torch.amax(scores, dim=-1, keepdim=True, out=new_top)
    torch.maximum(new_top, top_, out=new_top)
    scores.sub_(new_top).exp2_()
    top_.sub_(new_top).exp2_()  # how much what was folded before shrinks
    total_.mul_(top_).add_(scores.sum(dim=-1, keepdim=True))
    acc_.mul_(top_)
    torch.bmm(scores, v, out=part)
    acc_.add_(part)
    top_.copy_(new_top)


def finish_fold(
    top: torch.Tensor, total_: torch.Tensor, acc_: torch.Tensor, sinks: torch.Tensor | None, out: torch.Tensor
) -> None:
    """``out`` (n, heads, value_dim) from the folded ``acc`` (kv_heads, groups * n, value_dim).

    ``sinks`` (heads,) are logits that take part in the sum and give nothing (gpt-oss).
    """
    n, heads, width = out.shape
    kv_heads = acc_.shape[0]
    if sinks is not None:
        per_row = sinks.view(kv_heads, -1, 1, 1) * LOG2_E  # (kv_heads, groups, 1, 1)
        extra = (per_row - top.view(kv_heads, -1, n, 1)).exp2_()
        total_.view(kv_heads, -1, n, 1).add_(extra)
    acc_.div_(total_)
    out.view(n, kv_heads, heads // kv_heads, width).copy_(acc_.view(kv_heads, -1, n, width).permute(2, 0, 1, 3))


def causal_mask(key_positions: torch.Tensor, start: int, window: int | None, out: torch.Tensor) -> None:
    """``out`` (n, block) is true where the query at position ``start + row`` may not see the key: it comes later, or is
    ``window`` or more positions older."""
    queries = torch.arange(start, start + out.shape[0]).unsqueeze(1)
    torch.gt(key_positions, queries, out=out)
    if window is not None:
        out.logical_or_(key_positions <= queries - window)


def route(
    logits_: torch.Tensor,
    k: int,
    scoring: str,
    bias: torch.Tensor | None,
    n_group: int,
    topk_group: int,
    group_score: str,
    normalize: bool,
    scaling: float,
    chosen: torch.Tensor,
    gains: torch.Tensor,
    parts: Parts,
) -> None:
    """The experts of each token and their weights, from router logits (tokens, experts), which are used as scratch.

    Fills ``chosen`` (tokens, k) int64 and ``gains`` (tokens, k) float32. See
    :class:`tightfit.model.spec.MoeSpec` for the settings.
    """
    for start, stop in parts:
        scores = logits_[start:stop]
        if scoring == "softmax":
            scores.copy_(scores.softmax(dim=-1))
        elif scoring == "sigmoid":
            scores.sigmoid_()
        elif scoring != "topk_softmax":
            raise ValueError(f"unknown scoring {scoring!r}")
        ranking = scores if bias is None else scores + bias
        if n_group > 1:
            grouped = ranking.view(stop - start, n_group, -1)
            worth = grouped.amax(-1) if group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
            out_of = torch.ones_like(worth, dtype=torch.bool)
            out_of.scatter_(1, worth.topk(topk_group, dim=-1, sorted=False).indices, False)
            ranking = grouped.masked_fill(out_of.unsqueeze(-1), -torch.inf).view(stop - start, -1)
        indices = ranking.topk(k, dim=-1).indices
        gain = scores.gather(1, indices)
        if scoring == "topk_softmax":
            gain = gain.softmax(dim=-1)
        if normalize:
            gain /= gain.sum(dim=-1, keepdim=True) + 1e-20
        chosen[start:stop] = indices
        gains[start:stop] = gain * scaling


def zero_(x_: torch.Tensor) -> None:
    """``x = 0``"""
    x_.zero_()


def fill_(x_: torch.Tensor, value: float) -> None:
    """``x = value``"""
    x_.fill_(value)


def places_before(places: torch.Tensor, out: torch.Tensor) -> None:
    """``out`` (n, 2) int32: of each sequence and place the place before."""
    out[:, 0] = places[:, 0]
    torch.sub(places[:, 1], 1, out=out[:, 1])


def add_rows_(x_: torch.Tensor, rows: torch.Tensor, y_: torch.Tensor, gains: torch.Tensor) -> None:
    """``x[rows] += gains * y`` for (rows, features) and gains (rows,); ``y`` is used as scratch. Rows that
    are named twice are added in order."""
    y_.mul_(gains.unsqueeze(-1))
    x_.index_add_(0, rows, y_)


def gate_(x_: torch.Tensor, logits_: torch.Tensor, parts: Parts) -> None:
    """``x *= sigmoid(logits)`` for (rows, features) and (rows, 1); ``logits`` is used as scratch."""
    for start, stop in parts:
        logits_[start:stop].sigmoid_()
    x_.mul_(logits_)
