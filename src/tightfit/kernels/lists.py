"""Which tokens a row that decodes reads, by the scores of the groups that they are in: compiled where that was built,
else in torch. For use in operations, of which these functions are none: they are given their scratch memory."""

from __future__ import annotations

import math

import torch

from tightfit.kernels import cpu

EVERY = -math.inf


def score_centroids(
    centroids: torch.Tensor,
    q: torch.Tensor,
    scores_: torch.Tensor,
    scratch_: torch.Tensor,
    sizes: torch.Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Scores (n,) of one head's ``centroids`` (n, key_dim) with the queries ``q`` (groups, key_dim) of its group, all
    float32: the largest product with any of them; or with ``sizes`` (n,) int32, of how many keys each centroid is the
    mean, the largest share of one of its keys in a query's softmax over all of them, if keys were their centroids.
    ``scratch`` has n numbers."""
    count, dim = centroids.shape
    if cpu.available():
        rows = q.data_ptr(), q.stride(0), len(q)
        of_sizes = 0 if sizes is None else sizes.data_ptr()
        addresses = of_sizes, scale, scratch_.data_ptr(), scores_.data_ptr()
        cpu.module.score_centroids(centroids.data_ptr(), count, dim, *rows, *addresses)
        return
    products = q @ centroids.T
    if sizes is not None:
        weights = ((products - products[:, sizes > 0].amax(1, keepdim=True)) * scale).exp() * (sizes > 0)
        products = weights / (weights * sizes).sum(1, keepdim=True)
    scores_[:count] = products.amax(0)


def list_best(
    scores: torch.Tensor,
    listed_: torch.Tensor,
    order_: torch.Tensor,
    groups: torch.Tensor | None = None,
    least: float = EVERY,
) -> None:
    """Writes into ``listed`` (m,) int32 the tokens whose groups have the highest of ``scores`` (n,) float32, ascending,
    then -1. Token i is in group ``groups[i]`` (int32), or is listed in any case if that is negative; without ``groups``
    each token is its own. Groups with less than ``least`` are left out; of the last one that fits in part the first
    tokens are listed. ``order`` (2, n or more) int32 is scratch."""
    count, most = len(scores), len(listed_)
    if groups is not None and not len(groups):  # an empty tensor has no address
        count = 0
    if cpu.available():
        of_groups = (0, 0) if groups is None else (groups.data_ptr(), len(groups))
        addresses = listed_.data_ptr(), most, order_[0].data_ptr(), order_[1].data_ptr()
        cpu.module.list_best(scores.data_ptr(), count, *of_groups, least, *addresses)
        return
    ranked = [group for group in scores.sort(descending=True, stable=True).indices.tolist() if scores[group] >= least]
    tokens = {group: [group] for group in ranked}
    if groups is not None:
        tokens = {group: (groups == group).nonzero()[:, 0].tolist() for group in ranked}
    best = [] if groups is None else (groups < 0).nonzero()[:, 0].tolist()
    for group in ranked:
        best += tokens[group][: max(most - len(best), 0)]
    listed_.fill_(-1)
    listed_[: min(len(best), most)] = torch.tensor(sorted(best[:most]), dtype=torch.int32)
