"""Mixtures whose experts do not fit: hit rates and speed of cache policies, at four sizes of the cache.

    .venv/bin/python benchmarks/experts.py [--model FOLDER] [--shares 0.75 0.5 0.25 0] [--cache cold] [--out FILE.md]

FOLDER is what `tightfit compress` wrote of a mixture, or a checkpoint in its own precision; without it a random mixture
of 1.7 billion parameters, of which a token uses 0.3, is written and compressed to int4 in a temporary folder. Each row
is a process of its own with a budget in which everything else and so much of the experts fits (0: as few as work). It
continues a text of this file's own words by sampling, from a seed. `static` keeps what a census of other words counted.

What the disk allows is measured in the same call: experts in a random order, in pieces of the same sizes on as many
threads, and nothing else, the best of several passes; divided by the bytes that a token reads. Every row must write the
tokens that the model writes from memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import command, commit, in_page_cache, machine, table, tightfit
from tests import random_model
from tests.measure import run_measured

from tightfit.budget.ledger import Arena
from tightfit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.experts.cache import Key
from tightfit.experts.store import Shelf, expert_count, expert_reader, on_disk, slot_nbytes
from tightfit.model.families import model_spec
from tightfit.plan.schema import OWN
from tightfit.weights.placement.places import Place, group_of, layer_name
from tightfit.weights.placement.readers import READERS, Piece

MiB = 2**20
NOISE = 6 * MiB  # by how much what one process measures of itself differs from another
ROOM = 8 << 30  # a budget for plans of which it is not known yet what they take
POLICIES = ("lru", "lfu", "score", "static", "lru+gate", "lfu+gate", "score+gate", "static+gate")
PASSES = 3
AT_ONCE = 64  # experts of a pass
HERE = Path(__file__)


@dataclass(frozen=True)
class Row:
    """Bytes, rates in tokens or bytes per second. ``limit``: tokens a second that reading alone allows."""

    share: float
    policy: str
    slots: int
    budget: int
    peak: int
    hit_rate: float
    late_rate: float
    foreseen_rate: float
    read: float
    rate: float
    prefill: float
    limit: float | None
    same: bool


@dataclass(frozen=True)
class Stored:
    """The experts of a model as they lie on the disk, by layer."""

    checkpoint: Checkpoint
    layers: dict[int, tuple[Place, ...]]

    @staticmethod
    def of(checkpoint: Checkpoint) -> Stored:
        spec = model_spec(Config(checkpoint.config, checkpoint.name), checkpoint.tensors)
        groups = {index: group_of(checkpoint, spec, layer_name(index), OWN) for index in range(len(spec.layers))}
        layers = {index: on_disk(checkpoint, group)[1] for index, group in groups.items()}
        return Stored(checkpoint, {index: places for index, places in layers.items() if places})

    @property
    def count(self) -> int:
        return expert_count(list(self.layers.values()))

    def rate(self) -> float:
        """Bytes per second of reading experts as the cache does, and nothing else."""
        layers = [(layer_name(index), places) for index, places in self.layers.items()]
        shelves = [Shelf.of(places) for _, places in layers]
        reader = expert_reader(self.checkpoint, layers, shelves)
        arena = Arena(READERS * slot_nbytes(list(self.layers.values())))
        arena.use_large_pages()
        free = [arena.take(arena.capacity // READERS) for _ in range(READERS)]
        dice = random.Random(0)

        def pieces() -> Iterator[tuple[Key, Piece]]:
            for _ in range(AT_ONCE):
                mixture = dice.randrange(len(layers))
                key = mixture, dice.randrange(layers[mixture][1][0].param.experts)
                yield from ((key, piece) for piece in shelves[mixture].pieces(self.checkpoint))

        def read(wanted: tuple[Key, Piece]) -> int:
            (key, piece), buffer = wanted, free.pop()
            reader(key, piece, buffer[piece.start : piece.stop])
            free.append(buffer)
            return piece.stop - piece.start

        rates = []
        with ThreadPoolExecutor(READERS) as pool:
            for _ in range(PASSES):
                wanted = list(pieces())
                began = time.perf_counter()
                total = sum(pool.map(read, wanted))
                rates.append(total / (time.perf_counter() - began))
        return max(rates)


def measure(
    folder: Path, shares: list[float], policies: list[str], cache: str, new: int, threads: int, scratch: Path
) -> tuple[list[Row], float]:
    text = HERE.read_text(encoding="utf-8")
    prompt = text[text.index("class Stored") :][:400]
    weights = [] if (folder / "tightfit.safetensors").exists() else ["--weights", "bf16"]
    size = ["--context", 1024, "--threads", threads, *weights]
    run = ["run", folder, "-p", prompt, "--ignore-eos", "--temperature", 1, "--seed", 1]
    expected = tightfit(*run, "-n", new, *size)[0]["completions"]
    if any("static" in policy for policy in policies):
        tightfit("census", folder, "-p", text[: text.index("class Stored")] * 2)
    smallest = json.loads(
        run_measured([sys.executable, "-m", "tightfit", *map(str, [*run, *size]), "--json", "-m", "150MiB"]).stdout
    )["smallest_bytes"]
    with open_checkpoint(str(folder)) as checkpoint:
        stored = Stored.of(checkpoint)
        least = tightfit("plan", folder, "--memory", smallest, *size)[0]["plan"]
        rows, disk = [], 0.0
        for share in shares:
            budget = smallest
            for policy in policies:
                how: tuple[object, ...] = ("--memory", smallest, "--experts", policy, *size)
                if share:
                    plan = with_slots(least, max(round(share * stored.count), 2), policy)
                    file = scratch / "plan.json"
                    if budget == smallest:  # once for each share
                        file.write_text(json.dumps(plan))
                        budget = tightfit(*run, "-n", 1, "--plan", file)[0]["receipt"]["predicted_bytes"] + NOISE
                    file.write_text(json.dumps(plan | {"budget": budget}))
                    how = ("--plan", file)
                in_page_cache(folder, cache == "warm")
                disk = max(disk, stored.rate())
                in_page_cache(folder, cache == "warm")
                answer, peak = tightfit(*run, "-n", new, *how)
                rows.append(_row(share, policy, budget, peak, answer, disk, expected))
                print(f"{share:.0%}, {policy}: {rows[-1].rate:.2f} tokens/s", file=sys.stderr)
    return rows, disk


def with_slots(plan: Any, slots: int, policy: str) -> Any:
    """The plan with so many experts in memory, and everything else."""
    layers = [layer | {"resident": None} for layer in plan["layers"]]
    outer = plan["outer"] | {"resident": None, "placement": "resident"}
    experts = {"policy": policy, "slots": slots}
    return plan | {"layers": layers, "outer": outer, "experts": experts, "buffers": 0, "budget": ROOM}


def _row(share: float, policy: str, budget: int, peak: int, answer: Any, disk: float, expected: Any) -> Row:
    receipt = answer["receipt"]
    experts, read = receipt["decode_experts"], receipt["decode_streamed_bytes_per_token"] or 0.0
    return Row(
        share,
        policy,
        receipt["plan"]["experts"]["slots"],
        budget,
        peak,
        experts["hit_rate"],
        experts["late_rate"],
        experts["foreseen_rate"],
        read,
        receipt["decode_tokens_per_s"],
        receipt["prefill_tokens_per_s"],
        disk / read if read else None,
        answer["completions"] == expected,
    )


def report(name: str, rows: list[Row], disk: float, cache: str, threads: int, seconds: float) -> str:
    columns = ["experts in memory", "policy", "slots", "budget MiB", "peak MiB", "hits", "on their way", "foreseen"]
    columns += ["MB per token", "tok/s", "disk allows", "share", "prompt tok/s", "same tokens"]
    lines = []
    for row in rows:
        limit, share = ("", "") if row.limit is None else (f"{row.limit:.1f}", f"{row.rate / row.limit:.0%}")
        lines.append(
            [
                f"{row.share:.0%}" if row.share else "fewest",
                row.policy,
                str(row.slots),
                *(f"{nbytes / MiB:.0f}" for nbytes in (row.budget, row.peak)),
                *(f"{rate:.1%}" for rate in (row.hit_rate, row.late_rate, row.foreseen_rate)),
                f"{row.read / 1e6:.1f}",
                f"{row.rate:.2f}",
                limit,
                share,
                f"{row.prefill:.0f}",
                "yes" if row.same else "NO",
            ]
        )
    return f"""# Mixtures whose experts do not fit

Model: {name}, {threads} threads, page cache {cache}.

{table(columns, lines)}

Reading experts alone: {disk / 1e9:.2f} GB/s (the best of the run).
Machine: {machine(threads, "torch")} tightfit at {commit()}.
Command: `{command()}`, {seconds:.0f} s.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25, 0.0])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--cache", choices=("cold", "warm"), default="cold")
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help="write the table to a file")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["TIGHTFIT_CACHE"] = temporary  # a census of its own
        folder = arguments.model
        if folder is None:
            whole = random_model.write(Path(temporary) / "moe", "moe")
            folder = Path(temporary) / "moe-int4"
            tightfit("compress", whole, "--weights", "int4", "--out", folder)
        settings = arguments.cache, arguments.new, arguments.threads, Path(temporary)
        rows, disk = measure(folder, arguments.shares, arguments.policies, *settings)
    text = report(folder.name, rows, disk, arguments.cache, arguments.threads, time.monotonic() - began)
    print(json.dumps([asdict(row) for row in rows], indent=1) if arguments.json else text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
