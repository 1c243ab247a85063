"""What methods that keep keys and values in a file give for the memory that they take: the embedded model.

    .venv/bin/python benchmarks/kv_works_when/offload.py [--methods ...] [--questions 12] [--texts 6]

After prompts of 3900 tokens 64 follow, the right one each time: KL divergence of what is predicted from what the exact
cache predicts, and of what a token wants of the file how much was there or on its way (`PagedCache.fetched`); and
hidden numbers in prompts of 3700 tokens. For `tailor` call `tightfit fit nano --kv tailor --text FILE` first.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from benchmarks.common import held_out, machine, table
from benchmarks.kv import CONTEXT, FOLLOWED, Question, divergence, follow, interval, questions

import tightfit
from tightfit import zoo
from tightfit.kv.paged import PagedCache
from tightfit.lab.reader import Reader
from tightfit.zoo.presets import BOS
from tightfit.zoo.tasks import Material

METHODS = (
    "int2",
    "host(resident=64)",
    "quest(tokens=256,full=0)+host(resident=64)",
    "headinfer",
    "hgca(beta=0)",
    "hgca(beta=0.25)",
    "hgca",
    "hgca(beta=4)",
    "window(keep=512)",
    "specache",
    "specache(ahead=0)",
    "specache(tokens=64,ahead=64)",
    "tailor",
    "tailor(threshold=0)",
    "tailor(threshold=1)",
)
TEXT, NEEDLES = 3900, 3700  # tokens of prompts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    texts, _ = held_out(zoo.path())
    material = Material.of_text(tightfit.load("nano", "2GiB").tokenizer._tokenizer, "".join(texts))
    asked, rng, rows = questions(material, "needles", NEEDLES, options.questions), random.Random(0), []
    for _ in range(options.texts):
        start = rng.randrange(len(material.code) - TEXT - FOLLOWED)
        ids = [BOS, *material.code[start : start + TEXT + FOLLOWED].tolist()]
        rows.append(Question(ids[:TEXT], ids[TEXT : TEXT + FOLLOWED]))
    exact: list[torch.Tensor] = []
    lines = []
    for kv in ("none", *options.methods):
        reader = Reader(tightfit.load("nano", "2GiB", context=CONTEXT, kv=kv, threads=options.threads))
        logits = [follow(reader, row) for row in rows]
        exact = exact or logits
        losses = [divergence(a, b) for a, b in zip(exact, logits, strict=True)]
        cache = reader.model.borrow_engine().cache
        wanted, ahead, read, waited = cache.fetched if isinstance(cache, PagedCache) else (0, 0, 0, 0)
        decoded = options.texts * (FOLLOWED - 1)
        right = sum(bool((follow(reader, one).argmax(-1) == torch.tensor(one.answer)).all()) for one in asked)
        lines.append(
            [
                f"`{kv}`",
                f"{reader.kv_bytes()[0] / 2**20:.2f}",
                f"{statistics.mean(losses):.4f} ± {interval(losses):.4f}",
                f"{right}",
                f"{ahead / wanted:.1%}" if wanted else "",
                f"{read / decoded / 2**10:.0f}" if wanted else "",
                f"{waited / decoded / 1e6:.2f}" if wanted else "",
            ]
        )
        print(*lines[-1], file=sys.stderr, flush=True)
        reader.model.close()
    print(machine(options.threads, "torch"))
    columns = ["methods", "MiB reserved", "KL, nats", f"numbers found, of {options.questions}"]
    columns += ["there when wanted", "KiB read for a token", "ms waited for a token"]
    print(table(columns, lines))


if __name__ == "__main__":
    main()
