"""A prompt of tens of thousands of tokens in a cache that may take few bytes, under both schedules, measured from
outside.

    .venv/bin/python benchmarks/long_context.py [--model FOLDER] [--tokens 32768] [--kv 64MiB ...] [--memory 1.2GiB]

The model is a random llama of 1.05 billion parameters (weights do not matter for bytes and seconds) whose context is
declared to be long enough; without --model it is written to a temporary folder. `chunked` runs in the budget of
--memory, or in the smallest that works where that is more; `layered` in what `tightfit plan` says it needs. Peaks are
those of the process, as the operating system saw them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import machine, table, tightfit
from tests import random_model
from tests.measure import run_measured

from tightfit.budget.units import format_bytes, parse_bytes

NEW = 32
NOISE = 4 << 20  # by how much what `tightfit plan` measures of itself differs from another process


def with_context(model: Path, folder: Path, context: int) -> Path:
    """``model`` with a longer context declared, in ``folder``; its weights stay where they are."""
    folder.mkdir(exist_ok=True)
    for path in model.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    return folder


def needed(model: Path, options: list[object]) -> int:
    """The smallest budget that works, in bytes."""
    command = [sys.executable, "-m", "tightfit", "run", model, "-p", "x", "--memory", "200MiB", "--json", *options]
    answer = json.loads(run_measured([str(part) for part in command]).stdout)
    return int(answer["smallest_bytes"]) + NOISE


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--kv", nargs="+", default=["64MiB", "snapkv(keep=2048)", "int4"])
    parser.add_argument("--schedules", nargs="+", default=["chunked", "layered"])
    parser.add_argument("--memory", default="1.2GiB")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or random_model.write(Path(folder) / "written", "1b")
        model = with_context(model, Path(folder) / "long", 2 * options.tokens)
        prompt = Path(folder) / "prompt.txt"
        prompt.write_text("#" + "7" * (options.tokens - 1))  # after the first, each is a token
        rows = []
        for kv in options.kv:
            for schedule in options.schedules:
                about: list[object] = ["--weights", options.weights, "--kv", kv, "--prefill", schedule]
                about += ["--context", options.tokens + NEW + 8, "--threads", options.threads]
                smallest = needed(model, about)
                budget = max(parse_bytes(options.memory), smallest) if schedule == "chunked" else smallest
                print(f"{kv} {schedule} in {format_bytes(budget)}", file=sys.stderr, flush=True)
                answer, peak = tightfit(
                    "run", model, "--file", prompt, "-n", NEW, "--ignore-eos", "--memory", budget, *about
                )
                receipt = answer["receipt"]
                assert receipt["prompt_tokens"] >= options.tokens - 1
                assert peak <= budget, (peak, budget)
                kept = receipt["accounts"]["kv"]
                rows.append(
                    [
                        f"`{receipt['plan']['cache']}`, {schedule}",
                        f"{kept['reserved_bytes'] / 2**20:.0f}",
                        f"{receipt['accounts']['workspace']['reserved_bytes'] / 2**20:.0f}",
                        f"{receipt['plan']['chunk']}",
                        f"{budget / 2**20:.0f}",
                        f"{peak / 2**20:.0f}",
                        f"{receipt['prefill_tokens_per_s']:.0f}",
                        f"{receipt['decode_tokens_per_s']:.1f}",
                    ]
                )
    print(machine(options.threads, "torch"))
    print(f"\nA prompt of {options.tokens} tokens, then {NEW} new ones; weights {options.weights}. MiB and tokens/s.\n")
    print(table(["cache", "kv", "workspace", "chunk", "budget", "peak", "prompt", "new"], rows))


if __name__ == "__main__":
    main()
