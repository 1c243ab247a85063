"""The operations of sorting tokens into classes, one of which is nothing."""

from __future__ import annotations

import torch

from tightfit.kernels import ops
from tightfit.kv.merge.nearest import SHORTEST


@ops.op
def make_unit_(x_: torch.Tensor, lengths: torch.Tensor) -> None:
    """Scales rows (n, dim) to length 1; ``lengths`` (n,) is what they were."""
    torch.linalg.vector_norm(x_, dim=1, out=lengths)
    x_.div_(lengths.clamp(min=SHORTEST)[:, None])


@ops.op
def find_redundant(
    keys: torch.Tensor,
    centers: torch.Tensor,
    values: tuple[torch.Tensor, torch.Tensor] | None,
    products: torch.Tensor,
    redundancy: torch.Tensor,
    closest: torch.Tensor,
) -> None:
    """Of ``keys`` (n, dim) which of ``centers`` (m, dim) is ``closest`` (n,) int64, and its ``redundancy`` (n,): the
    cosine of both times that of their ``values`` (n, dim) and (m, dim). All have length 1. A negative cosine counts as
    0: opposites are not alike. ``products`` (2, n, m) is scratch."""
    torch.mm(keys, centers.T, out=products[0]).clamp_(min=0.0)
    if values is not None:
        torch.mm(values[0], values[1].T, out=products[1]).clamp_(min=0.0)
        products[0].mul_(products[1])
    torch.max(products[0], dim=1, out=(redundancy, closest))


@ops.op
def weigh_classes(
    redundancy_: torch.Tensor,
    closest: torch.Tensor,
    threshold: float,
    worth: tuple[torch.Tensor, torch.Tensor],
    own: torch.Tensor,
    changed: torch.Tensor,
) -> None:
    """Turns the ``redundancy`` (n,) of tokens into their weights in the classes they are ``closest`` (n,) to: by what
    tokens (n,) and centers (m,) are ``worth``; 0, the class of nothing, where it is below the ``threshold``. Centers
    keep the share ``own`` (m,), and ``changed`` (m,) bool says which take something up."""
    weights = torch.where(redundancy_ >= threshold, worth[0].clamp(min=SHORTEST), 0.0)
    own.copy_(worth[1].clamp(min=SHORTEST))
    whole = own.index_add(0, closest, weights)
    torch.gt(whole, own, out=changed)
    torch.div(weights, whole.index_select(0, closest), out=redundancy_)
    own.div_(whole)


@ops.op
def blend_lengths_(
    lengths_: torch.Tensor, own: torch.Tensor, into: torch.Tensor, weights: torch.Tensor, added_: torch.Tensor
) -> None:
    """Blends ``lengths`` (m,) with those that are ``added`` (n,); turns these into the ``weights`` (n,) for rows that
    have these lengths, where their directions are to be blended."""
    lengths_.mul_(own).index_add_(0, into, weights * added_)
    torch.div(weights, added_.clamp(min=SHORTEST), out=added_)


@ops.op
def set_lengths_(x_: torch.Tensor, lengths: torch.Tensor) -> None:
    """Scales rows (n, dim) to ``lengths`` (n,)."""
    x_.div_(torch.linalg.vector_norm(x_, dim=1).clamp_(min=SHORTEST)[:, None]).mul_(lengths[:, None])
