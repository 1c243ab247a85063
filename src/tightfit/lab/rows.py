"""What rows of logits say. Computed in double, and block by block: scratch does not grow with the vocabulary."""

from __future__ import annotations

import math

import torch

BLOCK = 1 << 14


def log_total(row: torch.Tensor) -> float:
    """The logarithm of the sum of exponentials of ``row`` (vocab,)."""
    top = row.max().item()
    return top + math.log(sum(part.double().sub_(top).exp_().sum().item() for part in row.split(BLOCK)))


def log_probability(row: torch.Tensor, token: int) -> float:
    """In nats."""
    return row[token].item() - log_total(row)


def divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """KL(exact || other) of the distributions that two rows of logits (vocab,) stand for, in nats."""
    totals, found = (log_total(exact), log_total(other)), 0.0
    for parts in zip(exact.split(BLOCK), other.split(BLOCK), strict=True):
        p, q = (part.double().sub_(total) for part, total in zip(parts, totals, strict=True))
        found += (p.exp() * (p - q)).sum().item()
    return max(found, 0.0)  # rounding may leave less
