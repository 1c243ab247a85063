"""How many tokens each layer and each head keeps, of a number that is kept on average.

``uniform``: the same everywhere. ``pyramid``: more in the first layers than in the last, in equal steps (PyramidKV,
https://arxiv.org/abs/2406.02069). ``adakv``: heads of a layer share their tokens by what scores highest in the whole
layer, but each has at least a fifth of its even share (Ada-KV, https://arxiv.org/abs/2407.11550). ``dynamickv``: layers
share their tokens by what scores highest in all of them, so that it is each prompt that says how many a layer keeps
(DynamicKV, https://arxiv.org/abs/2412.14838; :mod:`tightfit.kv.pooled`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BUDGETS = ("uniform", "pyramid", "adakv", "dynamickv")
PYRAMID_BETA = 20  # the last layer keeps this many times less than the average, beside what is protected (the paper's)
DYNAMIC_MOST = 4  # times the average that a layer keeps at most
SAFEGUARD = 0.2  # of an even share that each head keeps (the paper's alpha)


def of_layers(budget: str, keep: int, layers: int, protected: int, most: int) -> list[int]:
    """How many tokens each layer keeps where ``keep`` are kept on average, ``protected`` of them in any case, and none
    can keep more than ``most``."""
    if budget != "pyramid" or layers == 1:
        return [keep] * layers
    free = keep - protected
    low = free / PYRAMID_BETA
    high = 2 * free - low
    if high > most - protected:
        high = most - protected
        low = 2 * free - high
    if low < 0 or high < low:
        return [keep] * layers
    step = (high - low) / (layers - 1)
    return [protected + round(high - index * step) for index in range(layers)]


def choose(scores: torch.Tensor, counts: list[int], keep: int, budget: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens stay: ascending indices (heads, n) int32, and how many of them for each head (heads,) int32.

    ``scores`` (heads, n) of the first ``counts`` tokens are finite, or infinite for those that stay in any case, or
    minus infinite for those that do not.
    """
    import torch

    heads, width = scores.shape
    there = torch.arange(width) < torch.tensor(counts)[:, None]
    scores = scores.masked_fill(~there, -torch.inf)
    available = (scores > -torch.inf).sum(dim=1)
    order = scores.argsort(dim=1, descending=True, stable=True)
    if budget == "adakv":
        safe = order[:, : max(int(keep * SAFEGUARD), 1)]
        sure = scores.scatter(1, safe, torch.where(scores.gather(1, safe) > -torch.inf, torch.inf, -torch.inf))
        best = sure.flatten().argsort(descending=True, stable=True)[: keep * heads]
        kept = torch.bincount(best // width, minlength=heads).minimum(available)
    else:
        kept = available.clamp(max=keep)
    most = max(int(kept.max()), 1)  # a list of no columns would be none, by which everything stays
    # Those beyond a head's own number are sorted to the end.
    ranks = torch.arange(most)
    indices = torch.where(ranks < kept[:, None], order[:, :most], width).sort(dim=1).values
    return indices.to(torch.int32).contiguous(), kept.to(torch.int32)
