"""Training of projections of which any number of first features can be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tightfit.kv.base import LayerLayout
from tightfit.kv.fitted import Attend, Network
from tightfit.kv.lowrank.bases import rotation
from tightfit.kv.lowrank.matryoshka import PARTS, step_of

RATE = 3e-3


class Nested:
    """Orthogonal matrices (kv_heads, dim, dim) for each layer's ``keys`` and ``values``, which are turned by what is
    trained. ``means`` (kv_heads, value_dim) of values are kept apart, since attention's weights sum up to 1."""

    def __init__(
        self,
        layouts: Sequence[LayerLayout],
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        means: list[torch.Tensor],
    ) -> None:
        self.layouts = layouts
        self.starts = list(zip(keys, values, strict=True))
        self.means = means
        self.free = [[torch.zeros_like(x).requires_grad_() for x in both] for both in self.starts]
        self.optimizer = torch.optim.Adam([x for both in self.free for x in both], RATE)

    def matrices(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of a layer's keys and values as they are now."""
        keys, values = (
            start @ rotation(free) for start, free in zip(self.starts[layer], self.free[layer], strict=True)
        )
        return keys, values

    def train(self, network: Network, tokens: torch.Tensor, generator: torch.Generator, rate: float) -> float:
        """A step towards what ``network`` predicts for ``tokens`` (b, n) with all features, with random ranks of each
        layer and head. Gives the divergence before it, in nats per token."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * RATE
        with torch.no_grad():
            wanted = network.logits(network.hidden(tokens)).log_softmax(-1)
        matrices = []
        for layer, layout in enumerate(self.layouts):
            both = []
            for matrix in self.matrices(layer):
                dim = matrix.shape[2]
                ranks = torch.randint(1, PARTS + 1, (layout.kv_heads, 1, 1), generator=generator) * step_of(dim)
                both.append(matrix * (torch.arange(dim) < ranks))
            matrices.append((both[0], both[1]))
        found = network.logits(network.hidden(tokens, self.attend(network, matrices))).log_softmax(-1)
        loss = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="sum") / tokens.numel()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def attend(self, network: Network, matrices: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Attend:
        """Attention of a network with keys and values as far as they lie in the columns of ``matrices``."""

        def projected(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            of_keys, of_values = matrices[layer]
            inside, mean = of_values @ of_values.mT, self.means[layer]
            k = torch.einsum("bnhd,hde->bnhe", k, of_keys @ of_keys.mT)
            v = torch.einsum("bnhd,hde->bnhe", v - mean, inside) + mean
            return network.attention(layer, q, k, v)

        return projected


def search(nested: Nested, network: Network, tokens: torch.Tensor, done: Callable[[int], None]) -> list[int]:
    """The order in which features are best let go of, a step of a layer's keys (even numbers) or values (odd ones) at a
    time, judged by the final hidden states of ``tokens`` (b, n). Those that change them least go first, a quarter of
    all at once, down to one step each; ``done`` is told how many have gone."""
    matrices = [nested.matrices(layer) for layer in range(len(nested.layouts))]
    ranks = [matrix.shape[2] for both in matrices for matrix in both]
    steps = [step_of(rank) for rank in ranks]
    whole = network.hidden(tokens)
    order: list[int] = []

    def error(ranks: list[int]) -> float:
        pairs = zip(matrices, ranks[::2], ranks[1::2], strict=True)
        cut = [(keys[:, :, :key_rank], values[:, :, :value_rank]) for (keys, values), key_rank, value_rank in pairs]
        return float((network.hidden(tokens, nested.attend(network, cut)) - whole).norm())

    while candidates := [each for each, rank in enumerate(ranks) if rank > steps[each]]:
        errors = {}
        for each in candidates:
            fewer = list(ranks)
            fewer[each] -= steps[each]
            errors[each] = error(fewer)
        for each in sorted(candidates, key=errors.__getitem__)[: max(len(ranks) // 4, 1)]:
            ranks[each] -= steps[each]
            order.append(each)
        done(len(order))
    return order
