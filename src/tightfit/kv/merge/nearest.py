"""The operations of merging by similarity."""

from __future__ import annotations

import math

import torch

from tightfit.kernels import ops

SHORTEST = 1e-12  # a key without a direction is similar to none


@ops.op
def find_closest(
    keys: torch.Tensor,
    staying: torch.Tensor,
    lengths: tuple[torch.Tensor, torch.Tensor],
    products: torch.Tensor,
    similarity: torch.Tensor,
    closest: torch.Tensor,
) -> None:
    """Of each of ``keys`` (n, dim) which of ``staying`` (m, dim) is ``closest`` (n,) int64, and the cosine of both as
    ``similarity`` (n,). ``lengths`` (n,) and (m,), and ``products`` (n, m), are scratch."""
    for vectors, length in zip((keys, staying), lengths, strict=True):
        torch.linalg.vector_norm(vectors, dim=1, out=length).clamp_(min=SHORTEST)
    torch.mm(keys, staying.T, out=products)
    products.div_(lengths[0][:, None]).div_(lengths[1])
    torch.max(products, dim=1, out=(similarity, closest))


@ops.op
def compare_neighbours(
    keys_: torch.Tensor, before_: torch.Tensor, lengths: torch.Tensor, cosines: torch.Tensor
) -> None:
    """The ``cosines`` (n,) of each of ``keys`` (n, dim) and the one before it. ``before`` (dim,) is the one before the
    first, of length 1, or zeros; it becomes the last. Keys are scaled to length 1; ``lengths`` (n,) is scratch."""
    torch.linalg.vector_norm(keys_, dim=1, out=lengths).clamp_(min=SHORTEST)
    keys_.div_(lengths[:, None])
    cosines[0] = before_ @ keys_[0]
    torch.linalg.vecdot(keys_[1:], keys_[:-1], out=cosines[1:])
    before_.copy_(keys_[-1])


@ops.op
def weigh_similar(
    similarity_: torch.Tensor,
    closest: torch.Tensor,
    threshold_: torch.Tensor,
    ema: float,
    own: torch.Tensor,
    changed: torch.Tensor,
) -> None:
    """Turns the ``similarity`` (n,) of tokens into their weights in the tokens that they are merged into, 0 below the
    threshold; those keep the share ``own`` (m,), and ``changed`` (m,) bool says which of them take something up.
    ``threshold`` (1,) follows the mean similarity; at first it is NaN."""
    mean = similarity_.mean()
    threshold_.copy_(torch.where(threshold_.isnan(), mean, ema * mean + (1 - ema) * threshold_))
    dropped = similarity_ < threshold_
    similarity_.exp_().masked_fill_(dropped, 0.0)
    own.fill_(math.e).index_add_(0, closest, similarity_)
    torch.gt(own, math.e + 1e-6, out=changed)
    similarity_.div_(own.index_select(0, closest))
    own.reciprocal_().mul_(math.e).masked_fill_(~changed, 1.0)


@ops.op
def scale_rows_(x_: torch.Tensor, gains: torch.Tensor) -> None:
    """``x = gains * x`` for (rows, features) and gains (rows,)."""
    x_.mul_(gains[:, None])
