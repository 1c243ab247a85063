"""Keys of a head in clusters of alike directions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import ops, pages
from tightfit.kernels.pages import Pages, Run
from tightfit.kv.merge.nearest import find_closest

READ_AT_ONCE = 512  # tokens of a head that are read into float32


@dataclass(frozen=True)
class Keys:
    """Certain tokens [start, stop) of one head."""

    pages: Pages
    sequence: int
    head: int
    start: int
    stop: int
    ws: Workspace

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Some at a time, as the first one's place and keys (n, key_dim) in float32, in scratch memory until the next
        ones are asked for."""
        ws, (kv_heads, key_dim), value_dim = self.ws, self.pages.key_shape, self.pages.value_shape[1]
        with ws.frame():
            dtype = self.pages.keys.dtype
            nothing = Run(ws.empty(kv_heads, 1, key_dim, dtype=dtype), ws.empty(kv_heads, 1, value_dim, dtype=dtype), 0)
            for at in range(self.start, self.stop, READ_AT_ONCE):
                with ws.frame():
                    stop = min(at + READ_AT_ONCE, self.stop)
                    yield at, pages.read(self.pages, self.sequence, self.head, nothing, at, stop, ws)[0]


def cluster(keys: Keys, centroids_: torch.Tensor, assigned_: torch.Tensor, iterations: int, ws: Workspace) -> None:
    """k-means by cosine similarity (that of ClusterKV, https://arxiv.org/abs/2412.03213): writes the mean keys of
    clusters into ``centroids`` (k, key_dim) float32, and the cluster of each token into ``assigned`` (n,) int32. It
    begins with keys at equal distances, so that it is the same each time. Computes with operations alone."""
    count, dim = centroids_.shape
    first = torch.arange(count) * (keys.stop - keys.start) // count + keys.start
    for at, k in keys.blocks():
        a, b = torch.searchsorted(first, torch.tensor([at, at + len(k)])).tolist()
        ops.gather_rows(k, first[a:b] - at, centroids_[a:b])
    with ws.frame():
        sums, sizes, length = ws.empty(count, dim), ws.empty(count), ws.empty(count)
        for last in [False] * iterations + [True]:
            ops.zero_(sums)
            ops.zero_(sizes)
            for at, k in keys.blocks():
                with ws.frame():
                    closest = ws.empty(len(k), dtype=torch.int64)
                    similarity, norms = ws.empty(2, len(k))
                    find_closest(k, centroids_, (norms, length), ws.empty(len(k), count), similarity, closest)
                    _add(k, closest, sums, sizes)
                    ops.copy_(assigned_[at - keys.start : at - keys.start + len(k)], closest)
            if not last:
                _take_means(sums, sizes, centroids_)


@ops.op
def _add(k: torch.Tensor, closest: torch.Tensor, sums_: torch.Tensor, sizes_: torch.Tensor) -> None:
    sums_.index_add_(0, closest, k)
    sizes_ += torch.bincount(closest, minlength=len(sizes_))


@ops.op
def _take_means(sums_: torch.Tensor, sizes: torch.Tensor, centroids_: torch.Tensor) -> None:
    """Clusters without tokens stay where they were."""
    sums_.div_(sizes[:, None])
    torch.where(sizes[:, None] > 0, sums_, centroids_, out=centroids_)
