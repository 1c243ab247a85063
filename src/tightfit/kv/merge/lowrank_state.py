"""A state of low rank that keeps what was let go of: its operations, and how its kernel functions are trained."""

from __future__ import annotations

import math
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import dropout, gelu

from tightfit.kernels import ops

EPOCHS, RATE, DROPPED = 40, 1e-3, 0.3  # the paper's
BATCH = 2  # texts
FIRST_GAIN = 1e-4  # of the kernel function of keys
TINY = 1e-6  # inside of logarithms


@ops.op
def absorb(
    keys: Tensor, values: Tensor, weights: tuple[Tensor, ...], scratch: tuple[Tensor, Tensor, Tensor], state_: Tensor
) -> None:
    """Adds psi(k), and psi(k) v, of ``keys`` (n, key_dim) and ``values`` (n, value_dim) to ``state`` (rank, 1 +
    value_dim): psi(k) = |gelu(gelu(k A) B) C| for ``weights`` A (key_dim, hidden), B (hidden, rank), C (rank, rank).
    ``scratch`` is (n, hidden) and twice (n, rank)."""
    inner, outer, psi = scratch
    torch.ops.aten.gelu_(torch.mm(keys, weights[0], out=inner))
    torch.ops.aten.gelu_(torch.mm(inner, weights[1], out=outer))
    torch.mm(outer, weights[2], out=psi).abs_()
    state_[:, 0] += psi.sum(0)
    state_[:, 1:].addmm_(psi.T, values)


@ops.op
def gelu_(x: Tensor) -> None:
    torch.ops.aten.gelu_(x)


@ops.op
def look(phi_: Tensor, slots: Tensor, memory: Tensor, found_: Tensor, out: Tensor, lse: Tensor) -> None:
    """Linear attention over the states ``memory`` (sequences, kv_heads, rank * (1 + value_dim)) of ``slots`` (n,) with
    phi(q) = |gelu(``phi``)| (n, heads, rank), which is overwritten: into ``out`` (n, heads, value_dim), and into
    ``lse`` (n, heads) the logarithm to base 2 of what it divides by. ``found`` (n, kv_heads, groups, 1 + value_dim) is
    scratch. A row's bits do not depend on the others."""
    rank, width, kv_heads = phi_.shape[2], found_.shape[3], found_.shape[1]
    phi = torch.ops.aten.gelu_(phi_).abs_().view(*found_.shape[:3], rank)
    start = 0
    for slot, rows in groupby(slots.tolist()):
        stop = start + len(list(rows))
        states, sums = memory[slot].view(kv_heads, 1, rank, width).unbind(2), found_[start:stop].zero_()
        for state, factors in zip(states, phi[start:stop, ..., None].unbind(3), strict=True):
            sums.addcmul_(factors, state)
        start = stop
    sums = found_.flatten(1, 2)
    torch.log2(sums[..., 0], out=lse)
    torch.div(sums[..., 1:], sums[..., :1], out=out)


class Kernels(torch.nn.Module):
    """The kernel functions of one layer, as they are trained."""

    def __init__(self, heads: int, kv_heads: int, dim: int, hidden: int, rank: int) -> None:
        super().__init__()

        def uniform(count: int, rows: int, cols: int) -> torch.nn.Parameter:
            bound = math.sqrt(6 / (rows + cols))
            return torch.nn.Parameter(torch.empty(count, rows, cols).uniform_(-bound, bound))

        self.q_first, self.q_second = uniform(heads, dim, hidden), uniform(heads, hidden, rank)
        self.k_first, self.k_second = uniform(kv_heads, dim, hidden), uniform(kv_heads, hidden, rank)
        self.mix = uniform(kv_heads, rank, rank)
        self.gain, self.mixed = (torch.nn.Parameter(torch.full((kv_heads, 1, rank), FIRST_GAIN)) for _ in range(2))

    def last(self) -> Tensor:
        """What the second layer of keys is multiplied with, (kv_heads, rank, rank): k' = |D| k, then k' + k' M D2."""
        identity = torch.eye(self.mix.shape[1])
        return self.gain.abs().transpose(1, 2) * (identity + self.mix * self.mixed)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """phi(q) psi(k) (b, heads, n, n) of turned queries (b, heads, n, dim) and keys (b, kv_heads, n, dim)."""
        share = DROPPED if self.training else 0.0
        phi = gelu(gelu(dropout(q @ self.q_first, share)) @ self.q_second).abs()
        psi = (gelu(gelu(dropout(k @ self.k_first, share)) @ self.k_second) @ self.last()).abs()
        return phi @ psi.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)

    def found(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {"q_first": self.q_first, "q_second": self.q_second, "k_first": self.k_first}
        tensors |= {"k_second": self.k_second, "k_last": self.last()}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def heavy_hitters(weights: Tensor, keep: int) -> Tensor:
    """What each query of (b, kv_heads, n, n) attention weights sees under H2O with ``keep`` tokens, half of them recent
    ones: a mask of the same shape."""
    n, recent = weights.shape[-1], keep // 2
    seen = torch.ones(weights.shape, dtype=torch.bool).tril()
    mass = weights[:, :, :keep].sum(2)
    for at in range(keep, n):
        best = mass[..., : at - recent].topk(keep - recent, -1).indices
        seen[:, :, at, : at - recent] = torch.zeros(mass.shape, dtype=torch.bool).scatter(-1, best, True)[
            ..., : at - recent
        ]
        mass = (mass + weights[:, :, at]) * seen[:, :, at]
    return seen


class Texts:
    """What one layer computes of texts of ``n`` tokens, with and without what an evictor lets go of."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, project: Tensor, keep: int) -> None:
        groups = q.shape[1] // k.shape[1]
        self.q, self.k, self.v, self.project, self.keep = q, k, v.repeat_interleave(groups, 1), project, keep
        causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        logits = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scale
        weights = logits.masked_fill(~causal, -torch.inf).softmax(-1)
        self.wanted = self._projected(weights @ self.v)
        # Heads that share keys lose the same tokens.
        seen = heavy_hitters(weights.unflatten(1, (-1, groups)).sum(2), keep).repeat_interleave(groups, 1)
        self.gone = (causal & ~seen).float()
        self.sparse = logits.masked_fill(~seen, -torch.inf)
        self.lse = self.sparse.logsumexp(-1, keepdim=True)

    def _projected(self, out: Tensor) -> Tensor:
        return (out.transpose(1, 2).flatten(2) @ self.project.T)[:, self.keep :]

    def error(self, kernels: Kernels | None, which: Tensor) -> Tensor:
        """The mean square of what is missing in the layer's output for texts ``which`` (m,)."""
        sparse, lse, v = self.sparse[which], self.lse[which], self.v[which]
        if kernels is None:
            out = (sparse - lse).exp() @ v
        else:
            rest = kernels.scores(self.q[which], self.k[which]) * self.gone[which]
            whole = torch.logaddexp(lse, (rest.sum(-1, keepdim=True) + TINY).log())
            out = ((sparse - whole).exp() + rest * (-whole).exp()) @ v
        return (self._projected(out) - self.wanted[which]).square().mean()


def train(texts: Texts, held_out: Texts, hidden: int, rank: int) -> tuple[dict[str, Tensor], float, float]:
    """Kernel functions for a layer, and the error of its output on texts that were held out, without and with them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kernels = Kernels(texts.q.shape[1], texts.k.shape[1], texts.q.shape[3], hidden, rank)
        steps = torch.optim.Adam(kernels.parameters(), RATE)
        for _ in range(EPOCHS):
            for which in torch.randperm(len(texts.q)).split(BATCH):
                steps.zero_grad()
                texts.error(kernels, which).backward()
                steps.step()
    every = torch.arange(len(held_out.q))
    with torch.no_grad():
        kernels.eval()
        return kernels.found(), float(held_out.error(None, every)), float(held_out.error(kernels, every))
