"""Matrices times many vectors (prefill) beside torch's own bfloat16 product, in one process.

    .venv/bin/python benchmarks/gemm.py [--formats bf16 int4] [--tokens 512 64] [--shapes 2048x2048] [--threads 2]

`TFLOP/s` is the product of a stored matrix with float32 activations into float32 results, with all rounding and
decoding; `torch` is torch.mm of factors and results that are bfloat16 already. Each number is the best of many calls,
in turns with the others. What bounds them: for many tokens AMX, which does 1024 operations a cycle on each core (at the
clock that it leaves, about 2.6 TFLOP/s with real data where this was written); for few, how fast weights are read, and
those in few bits decoded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import best

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.weights.formats.stored import matrix_of, normal

from tightfit.budget.ledger import Arena, Workspace
from tightfit.budget.machine import processor
from tightfit.catalog import parse_one
from tightfit.kernels import cpu, matmul

SHAPES = ("2048x2048", "5632x2048", "2048x5632", "8192x3072")


def measure(rows: int, cols: int, formats: list[str], tokens: list[int], seconds: float) -> list[dict[str, object]]:
    weights = normal(rows, cols)
    dense = weights.bfloat16()
    stored = [matrix_of(parse_one("weights", name), weights).weight for name in formats]
    results: list[dict[str, object]] = []
    ws = Workspace(Arena(1 << 30))
    for count in tokens:
        x, out = normal(count, cols), torch.empty(count, rows)
        rounded, product = x.bfloat16(), torch.empty(count, rows, dtype=torch.bfloat16)
        calls: list[Callable[[], object]] = [lambda a=rounded, b=product: torch.mm(a, dense.T, out=b)]
        calls += [
            lambda w=weight, a=x, b=out, n=count: matmul.gemm(a, w, b, [(0, n)], torch.bfloat16, ws)
            for weight in stored
        ]
        seen = best(calls, seconds)
        rates = [2e-12 * rows * cols * count / time for time in seen]
        for name, rate in zip(formats, rates[1:], strict=True):
            results.append(
                {"shape": f"{rows}x{cols}", "tokens": count, "format": name, "tflops": rate, "torch_tflops": rates[0]}
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x columns of the matrix")
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8", "int4"], help="spec strings")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 256, 128, 64, 32, 16])
    parser.add_argument("--threads", type=int, default=cpu.threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="for each number")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cpu.set_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    results = []
    for shape in arguments.shapes:
        rows, cols = map(int, shape.split("x"))
        results += measure(rows, cols, arguments.formats, arguments.tokens, arguments.seconds)
    if arguments.json:
        print(json.dumps({"processor": processor()[0], "threads": arguments.threads, "results": results}))
        return
    kernels = cpu.features()["chosen"] if cpu.has_gemm() else f"torch, decoding by {cpu.features()['chosen']}"
    print(f"{processor()[0]}, {arguments.threads} threads, kernels: {kernels}, torch {torch.__version__}")
    print(f"\n| {'matrix':9} | {'tokens':>6} | {'format':8} | TFLOP/s | torch bf16 | ratio |")
    print("|---|---|---|---|---|---|")
    for row in results:
        ratio = float(str(row["tflops"])) / float(str(row["torch_tflops"]))
        print(
            f"| {row['shape']:9} | {row['tokens']:6} | {row['format']:8} | {row['tflops']:7.2f} "
            f"| {row['torch_tflops']:10.2f} | {ratio:5.2f} |"
        )


if __name__ == "__main__":
    main()
