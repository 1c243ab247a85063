"""The operations of merging runs of neighbours into one of them."""

from __future__ import annotations

import torch

from tightfit.kernels import ops


@ops.op
def square_distances(keys_: torch.Tensor, to: torch.Tensor, squares: torch.Tensor) -> None:
    """The ``squares`` (n,) of the distances of ``keys`` (n, dim), which are scratch afterwards, from keys ``to``."""
    keys_.sub_(to)
    torch.linalg.vecdot(keys_, keys_, out=squares)


@ops.op
def weigh_gaussian(
    squares_: torch.Tensor, pivots: torch.Tensor, own: torch.Tensor, widths: torch.Tensor, changed: torch.Tensor
) -> None:
    """Turns the ``squares`` (n,) of the distances of tokens from their ``pivots`` (n,) int64 into their weights in what
    they are merged into, exp(-d^2 / (2 sigma^2)) against 1 for the pivot, which keeps the share ``own`` (m,). sigma is
    the mean distance of a pivot's tokens, over the square root of 2. ``changed`` (m,) bool says which pivots have
    tokens; ``widths`` (m,) is scratch."""
    own.zero_().index_add_(0, pivots, torch.ones_like(squares_))
    torch.gt(own, 0.0, out=changed)
    widths.zero_().index_add_(0, pivots, squares_.sqrt()).div_(own.clamp_(min=1.0)).square_()  # 2 sigma^2
    squares_.div_(widths.clamp_(min=1e-30).index_select(0, pivots)).neg_().exp_()
    own.fill_(1.0).index_add_(0, pivots, squares_)
    squares_.div_(own.index_select(0, pivots))
    own.reciprocal_()


def join(alike_: torch.Tensor, tokens: list[int], keep: int, least: int) -> torch.Tensor:
    """Where neighbours join so that ``tokens`` of each head become ``keep`` runs on average of the heads, and at least
    ``least`` of each: (heads, n) bool, for those that are most ``alike`` (heads, n) to the one before them. What must
    not join is minus infinity, as what is left is afterwards."""
    order = alike_.argsort(dim=1, descending=True, stable=True)
    for head, count in enumerate(tokens):
        alike_[head, order[head, max(count - least, 0) :]] = -torch.inf
    joined = torch.zeros(alike_.numel(), dtype=torch.bool)
    joined[alike_.flatten().argsort(descending=True, stable=True)[: max(sum(tokens) - keep * len(tokens), 0)]] = True
    return joined.view(alike_.shape) & (alike_ > -torch.inf)


def pivots(joined: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Of the runs of tokens that are ``joined`` (n,) bool with the one before them, the first with most ``mass`` (n,)
    each."""
    runs, places = (~joined).cumsum(0) - 1, torch.arange(len(joined))
    most = torch.zeros(len(joined)).scatter_reduce(0, runs, mass, "amax")
    at_most = torch.where(mass == most[runs], places, len(joined))
    first = torch.full((len(joined),), len(joined)).scatter_reduce(0, runs, at_most, "amin")
    return first[: int(runs[-1]) + 1]


def borders(alike: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    """Of n tokens in order, which of those that stay (m,) int64 each belongs to, (n,) int64: between two of them, the
    border lies where neighbours are least ``alike`` (n,), of several such places at the last."""
    places = torch.arange(len(alike))
    after = torch.searchsorted(stays, places)  # how many that stay lie before
    least = torch.full((len(stays) + 1,), torch.inf).scatter_reduce(0, after, alike, "amin")
    at_border = torch.where(alike == least[after], places, 0)
    border = torch.zeros(len(stays) + 1, dtype=torch.int64).scatter_reduce(0, after, at_border, "amax")
    return (after - 1 + (places >= border[after]).long()).clamp_(0, len(stays) - 1)


@ops.op
def weigh_alike(into: torch.Tensor, weights: torch.Tensor, own: torch.Tensor, changed: torch.Tensor) -> None:
    """The ``weights`` (n,) of tokens in those they come ``into`` (n,) int64, and the share ``own`` (m,) that these
    keep, if all of them count alike; ``changed`` (m,) bool says which take something up."""
    weights.fill_(1.0)
    own.zero_().index_add_(0, into, weights)
    torch.gt(own, 0.0, out=changed)
    own.add_(1.0).reciprocal_()
    torch.index_select(own, 0, into, out=weights)


def nearest(positions: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Of each of ``positions`` (n,) which of ``anchors`` (m,), ascending, is nearest, (n,) int64: of two that are, the
    earlier one."""
    after = torch.searchsorted(anchors, positions).clamp(max=len(anchors) - 1)
    before = (after - 1).clamp(min=0)
    return torch.where(positions - anchors[before] <= (anchors[after] - positions).abs(), before, after)
