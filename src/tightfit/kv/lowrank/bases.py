"""Bases of keys and values in which a few features say most."""

from __future__ import annotations

import torch


class Moments:
    """Sums over tokens of vectors of ``heads`` heads, and of their products."""

    def __init__(self, heads: int, dim: int) -> None:
        self.count = 0
        self.sums = torch.zeros(heads, dim, dtype=torch.float64)
        self.products = torch.zeros(heads, dim, dim, dtype=torch.float64)

    def add(self, x: torch.Tensor) -> None:
        """More vectors (n, heads, dim)."""
        x = x.transpose(0, 1).double()
        self.count += x.shape[1]
        self.sums += x.sum(1)
        self.products += x.mT @ x

    def mean(self) -> torch.Tensor:
        """(heads, dim)"""
        return (self.sums / self.count).float()

    def principal(self, centered: bool) -> torch.Tensor:
        """Orthogonal matrices (heads, dim, dim): of each head the directions in which its vectors lie, the one that
        says most of them first; of what is left without their mean where ``centered``."""
        products = self.products
        if centered:
            products = products - self.sums[:, :, None] * self.sums[:, None] / self.count
        vectors: torch.Tensor = torch.linalg.eigh(products).eigenvectors
        return vectors.flip(2).float()

    def share(self, basis: torch.Tensor) -> float:
        """How much of the vectors' squares lies in the columns of ``basis`` (heads, dim, n)."""
        inside = torch.einsum("hdn,hde,hen->", basis.double(), self.products, basis.double())
        return float(inside / self.products.diagonal(dim1=1, dim2=2).sum())


def rotation(x: torch.Tensor) -> torch.Tensor:
    """Cayley's orthogonal matrices (..., n, n) of any square ones: the identity for zeros."""
    skew = x - x.mT
    one = torch.eye(x.shape[-1])
    turned: torch.Tensor = torch.linalg.solve(one + skew, one - skew)
    return turned
