"""Models that do not fit: tokens a second for each share of the weights in memory, beside what the disk alone allows.

    .venv/bin/python benchmarks/streaming.py [--model FOLDER] [--shares 0.75 0.5 0.25 0] [--airllm PYTHON]
        [--out FILE.md] [--json]

FOLDER is a checkpoint in bfloat16 or what `tightfit compress` wrote; without it a random llama of 1.05 billion
parameters is written and compressed to int4 in a temporary folder. Each row is a process of its own with a budget in
which so much of the weights fits (0: the smallest that works). `cold`: the page cache was asked to forget the files;
they are then read past it. `warm`: they were read before, and reading them is copying, by the cores that compute.

What the disk allows is measured in the same call: the files' bytes, in pieces of the same size on as many threads, and
nothing else, the best of several passes; divided by the bytes that a token reads. "Share" is of that. Every row must
write the tokens that the model writes from memory.

A second table shows that tokens share what is read: of a long prompt, and of prompts that are generated at once, by one
plan each, which is followed once more with a token at a time. What is expected is what a pass reads then, times the
passes and divided by the tokens; the head is read only in the last pass of a prompt.

--airllm names the Python that has airllm (peers/README.md); it runs in the same call, on the checkpoint in bfloat16,
for which it needs as much disk as that takes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import checked, command, commit, in_page_cache, machine, table, tightfit
from tests import random_model
from tests.measure import Measured, run_measured

from tightfit.budget.ledger import Arena
from tightfit.checkpoints.checkpoint import open_checkpoint
from tightfit.weights.placement.streamed import PIECE, READERS

MiB = 2**20
NOISE = 4 * MiB  # by how much what `tightfit plan` measures of itself differs from another process
SPARE = 32 * MiB  # in the second table, where the budget is not what is measured
CACHES = ("cold", "warm")
PASSES, MOST_READ = 5, 2**31  # bytes of a pass
UNLIMITED = "1TiB"
SHARED_AT, SHORT, STEPS = 0.25, 16, 8  # of the second table: share of the weights, tokens of short prompts, new tokens
AIRLLM = Path(__file__).resolve().parent / "peers" / "run_airllm.py"
AIRLLM_NEW = 4  # tokens, which take seconds each


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


@dataclass(frozen=True)
class Shared:
    """What a token reads in passes of so many ``tokens``, what is expected, and what it reads in a pass of its own;
    tokens a second."""

    what: str
    tokens: int
    alone: float
    expected: float
    read: float
    alone_rate: float
    rate: float


def reading(folder: Path, cache: str) -> float:
    """Bytes per second of reading tensors as streaming does, and nothing else."""
    in_page_cache(folder, cache == "warm")
    with open_checkpoint(str(folder)) as checkpoint, ThreadPoolExecutor(READERS) as pool:
        arena = Arena(2 * READERS * PIECE)
        arena.use_large_pages()
        free = [arena.take(PIECE) for _ in range(READERS)]

        def pieces() -> Iterator[tuple[Any, int, int]]:
            left = MOST_READ
            for info in checkpoint.tensors.values():
                for start in range(0, min(info.nbytes, left), PIECE):
                    yield info, start, min(PIECE, info.nbytes - start)
                left -= min(info.nbytes, left)

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


def stored(folder: Path) -> list[str]:
    """The option that asks for the weights as they are in the files."""
    return [] if (folder / "tightfit.safetensors").exists() else ["--weights", "bf16"]


def digits(tokens: int) -> str:
    """A prompt of so many tokens: the first is <|bos|>, and each character is one."""
    return "#" + "7" * (tokens - 2)


def accounts(folder: Path, size: list[Any]) -> tuple[int, int]:
    """Bytes of all the weights, and of everything else."""
    found = tightfit("plan", folder, "--memory", UNLIMITED, *size)[0]["plan"]["accounts"]
    return found["weights"], sum(found.values()) - found["weights"]


def measure(
    folder: Path, shares: list[float], prompt: int, new: int, threads: int
) -> tuple[list[Row], dict[str, float]]:
    size = ["--context", prompt + new + 1, "--threads", threads, *stored(folder)]
    text = ["run", folder, "-p", digits(prompt), "-n", new, "--ignore-eos", *size]
    whole, others = accounts(folder, size)
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


def measure_shared(folder: Path, prompt: int, batch: int, threads: int) -> Iterator[Shared]:
    config = json.loads((folder / "config.json").read_text())
    for prompts in ([digits(prompt)], [digits(SHORT)] * batch):
        phase = "prefill" if len(prompts) == 1 else "decode"
        # A chunk, which is not larger than the context, takes all short prompts: they begin to decode in the same step.
        context = prompt + STEPS if phase == "prefill" else max(batch * SHORT, SHORT + STEPS)
        size = ["--context", context, "--batch", len(prompts), "--threads", threads, *stored(folder)]
        whole, others = accounts(folder, size)
        budget = others + int(SHARED_AT * whole) + NOISE
        plan = tightfit("plan", folder, "--memory", budget, *size)[0]["plan"]
        receipts = []
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(plan | {"budget": budget + SPARE}, file)  # the one that follows it may find itself larger
            file.flush()
            for texts in ([digits(SHORT)], prompts):
                in_page_cache(folder, False)
                asked = [part for text in texts for part in ("-p", text)]
                answer, _ = tightfit("run", folder, "--plan", file.name, *asked, "-n", STEPS, "--ignore-eos")
                receipts.append(answer["receipt"])
        alone, together = receipts
        read = alone["decode_streamed_bytes_per_token"]
        if phase == "prefill":
            what, tokens, passes = f"a prompt of {prompt}", plan["chunk"], -(-prompt // plan["chunk"])
            of_head = plan["outer"]["nbytes"] / (1 if config.get("tie_word_embeddings") else 2)
            kept = plan["outer"]["resident"]
            streamed = 0 if kept is None else of_head * (1 - kept / config["vocab_size"])
            expected = (passes * read - (passes - 1) * streamed) / prompt
        else:
            what, tokens, expected = f"{batch} prompts at once", batch, read / batch
        found, rate = together[f"{phase}_streamed_bytes_per_token"], together[f"{phase}_tokens_per_s"]
        yield Shared(what, tokens, read, expected, found, alone["decode_tokens_per_s"], rate)
        print(f"{what}: {rate:.2f} tokens/s", file=sys.stderr)


def measure_airllm(python: Path, checkpoint: Path, prompt: int, threads: int) -> dict[str, float]:
    """``tokens_per_s``, ``prompt_tokens_per_s`` and ``peak_bytes`` of airllm, with its files in the page cache."""
    with tempfile.TemporaryDirectory() as split:
        command = [python, AIRLLM, checkpoint, "--split", split, "--prompt", prompt, "--new", AIRLLM_NEW]
        command += ["--warm", SHORT, "--threads", threads]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}

        def run(repeat: int) -> Measured:
            arguments = [str(part) for part in (*command, "--repeat", repeat)]
            return checked(run_measured(arguments, env=environment, timeout=3600))

        run(0)  # which writes the copies of the layers
        done = run(1)
    [times] = json.loads(done.stdout.splitlines()[-1])["runs"]
    return {
        "tokens_per_s": AIRLLM_NEW / (times["total_s"] - times["prefill_s"]),
        "prompt_tokens_per_s": prompt / times["prefill_s"],
        "peak_bytes": done.peak_bytes,
    }


def report(
    name: str,
    rows: list[Row],
    disk: dict[str, float],
    shared: list[Shared],
    airllm: dict[str, float] | None,
    threads: int,
    seconds: float,
) -> str:
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
    beside = ""
    if airllm is not None:
        beside = (
            f"airllm, on the checkpoint in bfloat16 that is in the page cache: {airllm['tokens_per_s']:.2f} tok/s, "
            f"{airllm['prompt_tokens_per_s']:.0f} prompt tok/s, peak {airllm['peak_bytes'] / MiB:.0f} MiB.\n"
        )
    return f"""# Models larger than memory

Model: {name}, {threads} threads.

{table(columns, lines)}

Reading alone: {disk["cold"] / 1e9:.2f} GB/s cold, {disk["warm"] / 1e9:.2f} GB/s warm (the best of the run).
{beside}
Tokens that share what is read, {SHARED_AT:.0%} of the weights in memory, page cache cold:

{table(SHARED_COLUMNS, [shared_line(row) for row in shared])}

Machine: {machine(threads, "torch")} tightfit at {commit()}.
Command: `{command()}`, {seconds:.0f} s.
"""


SHARED_COLUMNS = ["", "tokens of a pass", "MB per token alone", "expected", "on the receipt", "tok/s alone", "tok/s"]


def shared_line(row: Shared) -> list[str]:
    read = (f"{nbytes / 1e6:.2f}" for nbytes in (row.alone, row.expected, row.read))
    return [row.what, str(row.tokens), *read, f"{row.alone_rate:.2f}", f"{row.rate:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.25, 0.0])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--long", type=int, default=2048, metavar="TOKENS", help="of the second table's prompt")
    parser.add_argument("--batch", type=int, default=16, help="prompts at once of the second table")
    parser.add_argument("--airllm", type=Path, metavar="PYTHON", help="the Python that has airllm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help="write the table to a file")
    arguments = parser.parse_args()
    began = time.monotonic()
    if arguments.airllm and arguments.model and not stored(arguments.model):
        parser.error("airllm runs checkpoints: name one with --model, or none")
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = folder = arguments.model
        if folder is None:
            checkpoint = random_model.write(Path(temporary) / "1b", "1b")
            folder = Path(temporary) / "1b-int4"
            tightfit("compress", checkpoint, "--weights", "int4", "--out", folder)
        rows, disk = measure(folder, arguments.shares, arguments.prompt, arguments.new, arguments.threads)
        shared = list(measure_shared(folder, arguments.long, arguments.batch, arguments.threads))
        airllm = None
        if arguments.airllm:
            airllm = measure_airllm(arguments.airllm, checkpoint, arguments.prompt, arguments.threads)
    text = report(folder.name, rows, disk, shared, airllm, arguments.threads, time.monotonic() - began)
    results = {"rows": [asdict(row) for row in rows], "shared": [asdict(row) for row in shared], "airllm": airllm}
    print(json.dumps(results, indent=1) if arguments.json else text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
