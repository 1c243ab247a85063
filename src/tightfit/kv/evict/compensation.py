"""A token that stands for many: it has their mean key and their mean value, and counts as often as they are.

A state is how many they are, then the key, then the value.
"""

from __future__ import annotations

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels.attention import Scoring
from tightfit.kernels.ops import op
from tightfit.kernels.reference import LOG2_E


@op
def add_(state_: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None) -> None:
    """Takes tokens with ``keys`` (n, key_dim) and ``values`` (n, value_dim), or the first features of the keys, into
    ``state`` (1 + key_dim + value_dim,)."""
    before, key_dim = float(state_[0]), keys.shape[1]
    value_dim = len(state_) - 1 - key_dim
    both = (state_[1 : 1 + key_dim], keys), (state_[1 + key_dim :], keys[:, :value_dim] if values is None else values)
    state_[0] += len(keys)
    for mean, tokens in both:
        mean += (tokens.sum(0) - len(keys) * mean) / (before + len(keys))


def attend(
    states: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor,
    scoring: Scoring,
    out: torch.Tensor,
    lse: torch.Tensor,
    ws: Workspace,
) -> None:
    """Attention of ``q`` (n, heads, key_dim) to the ``states`` (sequences, kv_heads, numbers) of their sequences
    ``slots`` (n,) int32 into ``out`` (n, heads, value_dim); ``lse`` (n, heads) is to base 2, and minus infinite where
    a state is of no token."""
    with ws.frame():
        own, products = ws.empty(len(q), *states.shape[1:]), ws.empty(*q.shape)
        _attend(states, slots, q, scoring, out, lse, own, products)


@op
def _attend(
    states: torch.Tensor,
    slots: torch.Tensor,
    q: torch.Tensor,
    scoring: Scoring,
    out: torch.Tensor,
    lse: torch.Tensor,
    own_: torch.Tensor,
    products_: torch.Tensor,
) -> None:
    """:func:`attend` with scratch memory (n, kv_heads, numbers) and (n, heads, key_dim)."""
    kv_heads, key_dim = states.shape[1], q.shape[2]
    torch.index_select(states, 0, slots, out=own_)
    count, key, value = own_[..., :1], own_[..., 1 : 1 + key_dim], own_[..., 1 + key_dim :]
    of_group = products_.unflatten(1, (kv_heads, -1))  # (n, kv_heads, groups, key_dim)
    torch.mul(q.unflatten(1, (kv_heads, -1)), key[:, :, None], out=of_group)
    torch.sum(products_, -1, out=lse)
    lse *= scoring.scale
    if scoring.softcap is not None:
        lse.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    lse *= LOG2_E
    lse.unflatten(1, (kv_heads, -1)).add_(count.log2_())
    out.unflatten(1, (kv_heads, -1)).copy_(value[:, :, None])
