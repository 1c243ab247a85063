"""Models that do not fit: tokens a second for each share of the weights in memory, beside what the disk alone allows.

    .venv/bin/python benchmarks/streaming.py [--model FOLDER] [--shares 0.75 0.5 0.25 0] [--out FILE.md] [--json]

FOLDER is a checkpoint in bfloat16 or what `tightfit compress` wrote; without it a random llama of 1.05 billion
parameters is written and compressed to int4 in a temporary folder. Each row is a process of its own with a budget in
which so much of the weights fits (0: the smallest that works). `cold`: the page cache was asked to forget the files;
they are then read past it. `warm`: they were read before, and reading them is copying, by the cores that compute.

What the disk allows is measured in the same call: the files' bytes, in pieces of the same size on as many threads, and
nothing else, the best of several passes; divided by the bytes that a token reads. "Share" is of that. Every row must
write the tokens that the model writes from memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import checked, command, commit, in_page_cache, machine, table
from tests import random_model
from tests.measure import run_measured

from tightfit.budget.ledger import Arena
from tightfit.checkpoints.checkpoint import open_checkpoint
from tightfit.weights.placement.streamed import PIECE, READERS

MiB = 2**20
NOISE = 4 * MiB  # by how much what `tightfit plan` measures of itself differs from another process
CACHES = ("cold", "warm")
PASSES = 5


@dataclass(frozen=True)
class Row:
    """``limit``: tokens a second that reading alone allows; None where nothing is read."""

    share: float
    cache: str
    budget: int
    peak: int
    weights: int
    read: float
    rate: float
    prefill: float
    limit: float | None
    same: bool


def tightfit(*arguments: object) -> Any:
    done = checked(run_measured([sys.executable, "-m", "tightfit", *map(str, arguments), "--json"], timeout=900))
    return json.loads(done.stdout), done.peak_bytes


def reading(folder: Path, cache: str) -> float:
    """Bytes per second of reading all tensors as streaming does, and nothing else."""
    in_page_cache(folder, cache == "warm")
    with open_checkpoint(str(folder)) as checkpoint, ThreadPoolExecutor(READERS) as pool:
        arena = Arena(2 * READERS * PIECE)
        arena.use_large_pages()
        free = [arena.take(PIECE) for _ in range(READERS)]

        def pieces() -> Iterator[tuple[Any, int, int]]:
            for info in checkpoint.tensors.values():
                for start in range(0, info.nbytes, PIECE):
                    yield info, start, min(PIECE, info.nbytes - start)

        def read(piece: tuple[Any, int, int]) -> int:
            info, start, nbytes = piece
            buffer = free.pop()
            checkpoint.read_into(info, start, buffer[:nbytes].numpy().data)
            free.append(buffer)
            return nbytes

        rates = []
        for _ in range(PASSES):
            began = time.perf_counter()
            total = sum(pool.map(read, list(pieces())))
            rates.append(total / (time.perf_counter() - began))
        return max(rates)


def measure(
    folder: Path, shares: list[float], prompt: int, new: int, threads: int
) -> tuple[list[Row], dict[str, float]]:
    weights = [] if (folder / "tightfit.safetensors").exists() else ["--weights", "bf16"]
    size = ["--context", prompt + new + 1, "--threads", threads, *weights]
    text = ["run", folder, "-p", "#" + "7" * (prompt - 1), "-n", new, "--ignore-eos", *size]
    plan = tightfit("plan", folder, "--memory", "1TiB", *size)[0]["plan"]
    whole, others = plan["accounts"]["weights"], sum(plan["accounts"].values()) - plan["accounts"]["weights"]
    refused = run_measured([sys.executable, "-m", "tightfit", *map(str, text), "--json", "--memory", "100MiB"])
    smallest = json.loads(refused.stdout)["smallest_bytes"]
    expected = tightfit(*text, "--memory", others + whole + NOISE)[0]["completions"]
    disk = dict.fromkeys(CACHES, 0.0)
    rows = []
    for share in shares:
        budget = others + int(share * whole) + NOISE if share else smallest
        for cache in CACHES:
            disk[cache] = max(disk[cache], reading(folder, cache))
            in_page_cache(folder, cache == "warm")
            answer, peak = tightfit(*text, "--memory", budget)
            receipt = answer["receipt"]
            read = receipt["decode_streamed_bytes_per_token"] or 0.0
            rows.append(
                Row(
                    share,
                    cache,
                    budget,
                    peak,
                    receipt["accounts"]["weights"]["peak_bytes"],
                    read,
                    receipt["decode_tokens_per_s"],
                    receipt["prefill_tokens_per_s"],
                    disk[cache] / read if read else None,
                    answer["completions"] == expected,
                )
            )
            print(f"{share:.0%}, {cache}: {rows[-1].rate:.2f} tokens/s", file=sys.stderr)
    return rows, disk


def report(name: str, rows: list[Row], disk: dict[str, float], threads: int, seconds: float) -> str:
    columns = ["weights in memory", "page cache", "budget MiB", "peak MiB", "weights MiB", "MB per token", "tok/s"]
    columns += ["disk allows", "share", "prompt tok/s", "same tokens"]
    lines = []
    for row in rows:
        limit, share = ("", "") if row.limit is None else (f"{row.limit:.2f}", f"{row.rate / row.limit:.0%}")
        lines.append(
            [
                f"{row.share:.0%}" if row.share else "smallest",
                row.cache,
                *(f"{nbytes / MiB:.0f}" for nbytes in (row.budget, row.peak, row.weights)),
                f"{row.read / 1e6:.0f}",
                f"{row.rate:.2f}",
                limit,
                share,
                f"{row.prefill:.0f}",
                "yes" if row.same else "NO",
            ]
        )
    return f"""# Models larger than memory

Model: {name}, {threads} threads.

{table(columns, lines)}

Reading alone: {disk["cold"] / 1e9:.2f} GB/s cold, {disk["warm"] / 1e9:.2f} GB/s warm (the best of the run).
Machine: {machine(threads, "torch")} tightfit at {commit()}.
Command: `{command()}`, {seconds:.0f} s.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.25, 0.0])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help="write the table to a file")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.model
        if folder is None:
            whole = random_model.write(Path(temporary) / "1b", "1b")
            folder = Path(temporary) / "1b-int4"
            tightfit("compress", whole, "--weights", "int4", "--out", folder)
        rows, disk = measure(folder, arguments.shares, arguments.prompt, arguments.new, arguments.threads)
    text = report(folder.name, rows, disk, arguments.threads, time.monotonic() - began)
    print(json.dumps([asdict(row) for row in rows], indent=1) if arguments.json else text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
