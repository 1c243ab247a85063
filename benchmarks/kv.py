"""What methods of the cache cost in quality, and what they take: the embedded model, beside a cache that keeps
everything.

    .venv/bin/python benchmarks/kv.py [--methods int4 'snapkv(keep=512)+int4' ...] [--questions 16] [--json FILE]

Each method is loaded through the same interface as any run, inside the same budget. Of each text the prompt is computed
under the method's schedule, and what follows is then decoded token by token through its cache, the right token each
time:

- look-ups (`src/tightfit/zoo/tasks.py`: a dictionary, hidden numbers, copying) at several lengths, the question being
  the end of the prompt; an answer counts if every token of it is the most likely one;
- KL divergence of the next-token distributions from those of the exact cache, on held-out code: after a long prompt,
  the next 64 tokens.

Bytes are those of the `kv` account after the longest text: reserved, and resident as the operating system says; and
what the next token reads of keys, values and their bounds.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from benchmarks.common import held_out, machine, table

import tightfit
from tightfit import zoo
from tightfit.lab.reader import Reader
from tightfit.zoo.presets import BOS
from tightfit.zoo.tasks import TASKS, Material

METHODS = (
    "none",
    "int8",
    "int4",
    "int2",
    "think",
    "think+int4",
    "window(keep=512)",
    "h2o(keep=512)",
    "snapkv(keep=512)",
    "snapkv(keep=512,budget=pyramid)",
    "snapkv(keep=512,budget=adakv)",
    "d2o(keep=512)",
    "snapkv(keep=512)+int4",
    "quest(tokens=512)",
    "host(resident=256)",
    "snapkv(keep=512)+int4+host(resident=128)",
)
LAYERED = ("h2o(keep=512)", "snapkv(keep=512)", "snapkv(keep=512,budget=adakv)", "think")  # schedules are compared
TASK_TOKENS = {"dictionary": (1000, 2000, 3700), "needles": (1000, 2000, 3700), "copy": (200, 1000, 1800)}
FOLLOWED = 64  # tokens on which distributions are compared
TEXT_TOKENS = (1024, 2048, 3900)
CONTEXT = 4096


@dataclass(frozen=True)
class Question:
    prompt: list[int]
    answer: list[int]


def follow(reader: Reader, asked: Question) -> torch.Tensor:
    """The logits (n, vocab) that predict the answer, token by token."""
    return torch.stack([row.clone() for row in reader.follow(asked.prompt, asked.answer)])


def questions(material: Material, task: str, tokens: int, count: int) -> list[Question]:
    rng = random.Random(f"{task}/{tokens}")
    found = []
    for _ in range(count):
        example = TASKS[task](rng, material, tokens)
        question = next(example.questions)
        prompt = [BOS, *material.encode(example.context + question.prompt)]
        found.append(Question(prompt, material.encode(question.answer)))
    return found


def measure(reader: Reader, asked: dict[tuple[str, int], list[Question]], rows: list[Question]) -> dict[str, Any]:
    """Right answers by task and length, and the logits on the texts."""
    right = {
        f"{task}/{tokens}": sum(
            bool((follow(reader, one).argmax(-1) == torch.tensor(one.answer)).all()) for one in list_
        )
        for (task, tokens), list_ in asked.items()
    }
    logits = [follow(reader, row) for row in rows]
    reserved, resident = reader.kv_bytes()
    return {
        "right": right,
        "logits": logits,
        "reserved": reserved,
        "resident": resident,
        "read": reader.read_bytes(),
    }


def divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """The mean KL divergence of distributions from the exact ones, in nats."""
    p, q = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def interval(values: Sequence[float]) -> float:
    """Half of a 95% interval of their mean."""
    return 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--layered", nargs="*", default=LAYERED, help="methods that are measured layer by layer too")
    parser.add_argument("--questions", type=int, default=16, help="for each task and length")
    parser.add_argument("--texts", type=int, default=12, help="held-out texts for each length")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers to a file")
    options = parser.parse_args(arguments)
    began = time.monotonic()

    texts, _ = held_out(zoo.path())
    tokenizer = tightfit.load("nano", options.memory).tokenizer._tokenizer
    material = Material.of_text(tokenizer, "".join(texts))
    asked = {
        (task, tokens): questions(material, task, tokens, options.questions)
        for task, lengths in TASK_TOKENS.items()
        for tokens in lengths
    }
    rng = random.Random(0)
    rows = []
    for tokens in TEXT_TOKENS:
        for _ in range(options.texts):
            start = rng.randrange(len(material.code) - tokens - FOLLOWED)
            ids = [BOS, *material.code[start : start + tokens + FOLLOWED].tolist()]
            rows.append(Question(ids[:tokens], ids[tokens : tokens + FOLLOWED]))

    runs = [("none", "chunked")]
    runs += [(kv, "chunked") for kv in options.methods if kv != "none"]
    runs += [(kv, "layered") for kv in options.layered]
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for number, (kv, prefill) in enumerate(runs, start=1):
        print(f"{number}/{len(runs)} {kv} {prefill}", file=sys.stderr, flush=True)
        reader = Reader(
            tightfit.load("nano", options.memory, context=CONTEXT, kv=kv, prefill=prefill, threads=options.threads)
        )
        results[kv, prefill] = measure(reader, asked, rows)
        reader.model.close()
    exact = results["none", "chunked"]["logits"]

    lines, numbers = [], []
    for (kv, prefill), found in results.items():
        losses = [divergence(a, b) for a, b in zip(exact, found.pop("logits"), strict=True)]
        by_length = [losses[i * options.texts : (i + 1) * options.texts] for i in range(len(TEXT_TOKENS))]
        numbers.append({"kv": kv, "prefill": prefill, "kl": losses, **found})
        lines.append(
            [
                f"`{kv}`" + (" layered" if prefill == "layered" else ""),
                f"{found['reserved'] / 2**20:.2f}",
                f"{found['resident'] / 2**20:.2f}",
                f"{found['read'] / 2**20:.2f}",
                *(f"{statistics.mean(part):.4f} ± {interval(part):.4f}" for part in by_length),
                *(
                    "/".join(f"{found['right'][f'{task}/{n}']}" for n in lengths)
                    for task, lengths in TASK_TOKENS.items()
                ),
            ]
        )
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1))
    print(machine(options.threads, "torch"))
    print(f"\n{options.questions} questions for each task and length, {options.texts} texts for each length.\n")
    columns = ["methods", "kv MiB reserved", "resident", "read by a token", *(f"KL after {n}" for n in TEXT_TOKENS)]
    columns += [f"{task} {'/'.join(map(str, lengths))}" for task, lengths in TASK_TOKENS.items()]
    print(table(columns, lines))
    print(f"\nMeasured in {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    main()
