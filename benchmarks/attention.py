"""Attention over a cache: of a token that decodes, and of a chunk of a long prompt beside torch's, in one process.

    .venv/bin/python benchmarks/attention.py [--shape 32,4,64] [--contexts 512 8192] [--kv bfloat16] [--threads 2]

A decoding token reads its whole cache once, so memory bandwidth bounds it; caches take turns, so that together they are
larger than any processor's own (where they are not, the share may exceed 1). A chunk of 512 tokens is bounded by
arithmetic: `bf16` is what prefill runs where the plan says gemm=bfloat16 (AMX where there is one: 1024 operations a
cycle on each core, and about 6 cycles for each 16 powers of two), `float32` where it does not, `fold` the torch
reference, `sdpa` torch's own scaled_dot_product_attention on tensors that are bfloat16 already. Only what is
not masked counts as operations. Each number is the best of many calls, in turns with the others.
The last columns are the same token over pages of 8, 4 and 2 bits, and the share of the bandwidth at which they are
read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import best, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tightfit.budget.ledger import Arena, Workspace
from tightfit.budget.machine import processor
from tightfit.kernels import attention, attention_reference, cpu, pages
from tightfit.kernels.attention import KeysValues, Scoring
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.make import kv_nbytes
from tightfit.kv.paged import PagedCache
from tightfit.plan.profile import measure_bandwidth

CHUNK = 512
MOST_CACHES = 256


def make_cache(kv_heads: int, context: int, dim: int, dtype: torch.dtype) -> KeysValues:
    arena = Arena(2 * kv_heads * context * dim * dtype.itemsize + 128)
    parts = (arena.take(kv_heads * context * dim * dtype.itemsize).view(dtype) for _ in range(2))
    keys, values = (part.view(1, kv_heads, context, dim).normal_() for part in parts)
    return KeysValues(keys, values)


def decode(heads: int, kv_heads: int, dim: int, context: int, dtype: torch.dtype, total: int, seconds: float) -> float:
    """Seconds that one token takes in one layer."""
    size = 2 * kv_heads * context * dim * dtype.itemsize
    caches = [make_cache(kv_heads, context, dim, dtype) for _ in range(max(1, min(total // size, MOST_CACHES)))]
    places = torch.tensor([[0, context - 1]], dtype=torch.int32)
    q, out, ws = torch.randn(1, heads, dim), torch.empty(1, heads, dim), Workspace(Arena(1 << 28))

    def step() -> None:
        for cache in caches:
            attention.attend_rows(cache, places, q, out, ws, Scoring(dim**-0.5))

    return best([step], seconds)[0] / len(caches)


def decode_pages(
    heads: int, kv_heads: int, dim: int, context: int, dtype: torch.dtype, kv: str, total: int, seconds: float
) -> tuple[float, int]:
    """Seconds that one token takes in one layer whose pages are coded as ``kv`` says, and the bytes that it reads."""
    layout = LayerLayout(kv_heads, dim, dim, context, heads=heads)
    size = kv_nbytes(kv, [layout], context, 1, str(dtype).removeprefix("torch."))
    layers = max(1, min(total // size, MOST_CACHES))
    cache = PagedCache([layout] * layers, compose(kv), context, 1, dtype, Arena(2 * layers * size), dtype)
    cache.begin(0, 0)
    q, out, ws = torch.randn(1, heads, dim), torch.empty(1, heads, dim), Workspace(Arena(1 << 28))
    k, v = torch.randn(2, kv_heads, context, dim).to(dtype)
    for kept in cache.layers:
        pages.keep(kept, 0, pages.Run(k, v, context), ws, tail=33)
    cache.tokens[0] = context
    rows, looking = pages.Rows(torch.tensor([[0, context]], dtype=torch.int32)), pages.Looking(q)
    kept = cache.layers[0]
    read = kv_heads * (context // pages.PAGE) * (kept.key_codec.page_bytes + kept.value_codec.page_bytes)

    def step() -> None:
        for kept in cache.layers:
            pages.attend_rows(kept, rows, looking, out, None, ws, Scoring(dim**-0.5))

    return best([step], seconds)[0] / layers, read


def prefill(heads: int, kv_heads: int, dim: int, context: int, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Operations per second, by what computes them."""
    count = min(CHUNK, context)
    start = context - count
    cache, ws = make_cache(kv_heads, context, dim, dtype), Workspace(Arena(1 << 30))
    q, out = torch.randn(count, heads, dim), torch.empty(count, heads, dim)
    scoring = Scoring(dim**-0.5)
    halves = [tensor.bfloat16() for tensor in (q.transpose(0, 1)[None].contiguous(), cache.keys, cache.values)]
    hidden = torch.full((count, count), -torch.inf).triu(1)
    mask = torch.cat([torch.zeros(count, start), hidden], 1).bfloat16() if start else None
    sdpa = torch.nn.functional.scaled_dot_product_attention
    calls: dict[str, Callable[[], object]] = {
        "bf16": lambda: attention.attend(cache, 0, start, q, out, ws, scoring, bf16=True),
        "float32": lambda: attention.attend(cache, 0, start, q, out, ws, scoring),
        "fold": lambda: attention_reference.attend(q, cache.keys[0], cache.values[0], start, out, ws, *scoring),
        "sdpa": lambda: sdpa(*halves, attn_mask=mask, is_causal=mask is None, enable_gqa=True),
    }
    operations = 4 * heads * dim * count * (start + (count + 1) / 2)
    return {name: operations / took for name, took in zip(calls, best([*calls.values()], seconds), strict=True)}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="32,4,64", help="heads, key-value heads, features of a head")
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 512, 2048, 8192, 32768])
    parser.add_argument(
        "--kv", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="type of the cache"
    )
    parser.add_argument("--pages", nargs="*", default=["int8", "int4", "int2"], help="codes of pages")
    parser.add_argument("--threads", type=int, default=cpu.threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number")
    parser.add_argument("--total", type=int, default=1 << 30, help="bytes of all caches that decoding reads in turn")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    heads, kv_heads, dim = map(int, arguments.shape.split(","))
    dtype: torch.dtype = getattr(torch, arguments.kv)
    cpu.set_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    bandwidth = measure_bandwidth(arguments.threads).bytes_per_s
    results = []
    for context in arguments.contexts:
        took = decode(heads, kv_heads, dim, context, dtype, arguments.total, arguments.seconds)
        rate = 2 * kv_heads * context * dim * dtype.itemsize / took
        operations = prefill(heads, kv_heads, dim, context, dtype, arguments.seconds)
        result = {"context": context, "decode_s": took, "bytes_per_s": rate, "prefill_flops": operations}
        for kv in arguments.pages:
            coded, read = decode_pages(
                heads, kv_heads, dim, context, dtype, f"{kv}(recent=0)", arguments.total, arguments.seconds
            )
            result[kv] = {"decode_s": coded, "bytes_per_s": read / coded}
        results.append(result)
    if arguments.json:
        setting = {"processor": processor()[0], "threads": arguments.threads, "shape": [heads, kv_heads, dim]}
        print(json.dumps({**setting, "kv": arguments.kv, "bandwidth": bandwidth, "results": results}))
        return
    print(
        f"{processor()[0]}, {arguments.threads} threads, kernels: {cpu.features()['chosen']}, torch "
        f"{torch.__version__}; {heads} heads, {kv_heads} of keys and values, {dim} features, cache in {arguments.kv}; "
        "memory gives "
        f"{bandwidth / 1e9:.1f} GB/s\n"
    )
    columns = [
        "context",
        "decode µs",
        "GB/s",
        "share",
        "bf16 GFLOP/s",
        "float32",
        "fold",
        "sdpa",
        "bf16/fold",
        "bf16/sdpa",
        *(f"{kv} µs (share)" for kv in arguments.pages),
    ]
    rows = []
    for result in results:
        ours = result["prefill_flops"]
        rates = [f"{ours[name] / 1e9:.0f}" for name in ("bf16", "float32", "fold", "sdpa")]
        ratios = [f"{ours['bf16'] / ours[name]:.2f}" for name in ("fold", "sdpa")]
        share = f"{result['bytes_per_s'] / bandwidth:.2f}"
        decoding = [f"{result['decode_s'] * 1e6:.1f}", f"{result['bytes_per_s'] / 1e9:.1f}", share]
        coded = [
            f"{result[kv]['decode_s'] * 1e6:.1f} ({result[kv]['bytes_per_s'] / bandwidth:.2f})"
            for kv in arguments.pages
        ]
        rows.append([str(result["context"]), *decoding, *rates, *ratios, *coded])
    print(table(columns, rows))


if __name__ == "__main__":
    main()
