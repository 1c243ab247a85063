"""Key-value heads that are told apart by how they look at a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from tightfit.kernels.attention import Scoring
    from tightfit.kv.base import LayerLayout


def all_but(layouts: Sequence[LayerLayout], ranked: Sequence[tuple[torch.Tensor, float]]) -> list[list[bool]]:
    """Of each layer which heads stream if those do not that have the highest of some scores (layers, kv_heads), for
    each of these a share of all heads. Heads of layers with windows do not count."""
    streams = [[True] * layout.kv_heads for layout in layouts]
    heads = [(i, head) for i, each in enumerate(layouts) if each.window is None for head in range(each.kv_heads)]
    for scores, share in ranked:
        best = sorted(heads, key=lambda at: -float(scores[at]))
        for layer, head in best[: round(share * len(heads))]:
            streams[layer][head] = False
    return streams


def weights(products: torch.Tensor, hidden: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Attention of each query to each key, by their ``products`` (..., heads, n, m); ``hidden`` (n, m) bool says which
    keys a query does not see."""
    import torch

    scores = products * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * (scores / scoring.softcap).tanh()
    scores = scores.masked_fill(hidden, -torch.inf)
    if scoring.sinks is not None:
        scores = torch.cat([scores, scoring.sinks.view(-1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    return scores.softmax(-1)[..., : products.shape[-1]]
