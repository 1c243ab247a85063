"""Matrices to test with."""

import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.weights.formats import FP4, FP8, NF4, Int2, Int3, Int4, Int5, Int6, Int8, LlmInt8, Pruned, Ternary

INTEGERS = [Int8, Int6, Int5, Int4, Int3, Int2]
# Scales in float16, which have less range: what GGUF's types need, and others.
HALVES = [
    *(cls(32, True, "f16") for cls in (Int8, Int5, Int4)),
    Int6(16, True, "f16"),
    *(cls(32, False, "f16") for cls in (Int5, Int4)),
    Int8(48, False, "f16"),
]
# Every kind of tile, with and without offsets, in small and large groups and in whole rows.
TILED = [
    *(cls(group, symmetric) for cls in INTEGERS for group, symmetric in ((32, True), (48, False), (0, True))),
    *(cls(group) for cls in (NF4, FP4) for group in (32, 0)),
    *(Ternary(group) for group in (96, 48, 0)),
    *(FP8(exponent) for exponent in (2, 3, 4, 5)),
    FP8(0, 64),
    *HALVES,
]
LOSSY = [*TILED, LlmInt8(), LlmInt8(outliers=0.2), Pruned(), Pruned(keep=0.1)]


def blocks_of(weights, rows=32):
    """What a format is given to begin with."""
    return lambda: ((row, weights[row : row + rows]) for row in range(0, len(weights), rows))


def encoded(fmt, weights):
    data = torch.full((fmt.nbytes(*weights.shape),), 0xA5, dtype=torch.uint8)  # nothing may rely on zeros
    fmt.begin(data, tuple(weights.shape), blocks_of(weights))
    fmt.encode(weights, data, 0)
    return data


def matrix_of(fmt, weights, gemm_dtype=None, activations="float32"):
    return fmt.matrix(encoded(fmt, weights), *weights.shape, gemm_dtype, activations)


def dense(matrix):
    out = torch.empty(matrix.rows, matrix.cols)
    matrix.decode(torch.arange(matrix.rows), out, Workspace(Arena(64 << 20)))
    return out


def decoded(fmt, weights):
    return dense(matrix_of(fmt, weights))


def squared_error(fmt, weights):
    return (decoded(fmt, weights) - weights).double().square().sum().item()


def normal(rows, cols, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
