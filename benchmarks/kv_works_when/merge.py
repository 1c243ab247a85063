"""Whether merging keeps more than letting go: the embedded model, methods that keep as many tokens side by side.

    .venv/bin/python benchmarks/kv_works_when/merge.py 'h2o(keep=0.5)' 'kvmerger(keep=0.5)' [--layered] [--texts 6]

Each method sees the same held-out code and the same look-ups, of `--tokens` tokens: the KL divergence of the next 64
tokens from the exact cache's, the perplexity of these, and questions on hidden numbers and dictionaries that are
answered right. `drop:elastic(keep=256)` keeps the same tokens and drops the others instead of merging them. For
`lococo` call `tightfit fit nano --kv lococo --text FILE` first.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from benchmarks.common import held_out, table
from benchmarks.kv import FOLLOWED, Question, divergence, follow, interval, questions

import tightfit
from tightfit import zoo
from tightfit.kv.compose import compose
from tightfit.kv.method import Merger
from tightfit.lab.reader import Reader
from tightfit.zoo.presets import BOS
from tightfit.zoo.tasks import Material


def dropping(kv: str) -> str:
    """The methods of ``kv``; if it begins with ``drop:``, their mergers merge nothing from now on."""
    plain = kv.removeprefix("drop:")
    for method in compose(plain).methods if plain != kv else ():
        if isinstance(method, Merger):
            type(method).merge = lambda self, staying_, *rest: torch.zeros(len(staying_.keys), dtype=torch.bool)
    return plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--layered", action="store_true", help="judge prompts as a whole, as the papers do")
    parser.add_argument("--tokens", type=int, default=1500, help="of each prompt")
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--questions", type=int, default=6, help="of each task")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    texts, _ = held_out(zoo.path())
    material = Material.of_text(tightfit.load("nano", "2GiB").tokenizer._tokenizer, "".join(texts))
    rng, n = random.Random(0), options.tokens
    rows = []
    for start in (rng.randrange(len(material.code) - n - FOLLOWED) for _ in range(options.texts)):
        ids = [BOS, *material.code[start : start + n + FOLLOWED].tolist()]
        rows.append(Question(ids[:n], ids[n : n + FOLLOWED]))
    asked = [one for task in ("needles", "dictionary") for one in questions(material, task, n, options.questions)]
    exact, lines = [], []
    for kv in ("none", *options.methods):
        prefill = "layered" if options.layered else "chunked"
        reader = Reader(
            tightfit.load("nano", "2GiB", context=4096, kv=dropping(kv), prefill=prefill, threads=options.threads)
        )
        logits = [follow(reader, row) for row in rows]
        exact = exact or logits
        losses = [divergence(a, b) for a, b in zip(exact, logits, strict=True)]
        surprise = [
            torch.nn.functional.cross_entropy(a, torch.tensor(row.answer)) for a, row in zip(logits, rows, strict=True)
        ]
        right = [bool((follow(reader, one).argmax(-1) == torch.tensor(one.answer)).all()) for one in asked]
        cells = [f"`{kv}`", f"{reader.kv_bytes()[0] / 2**20:.2f}"]
        cells += [f"{statistics.mean(losses):.4f} ± {interval(losses):.4f}"]
        cells += [f"{math.exp(statistics.mean(map(float, surprise))):.3f}", f"{sum(right)}/{len(right)}"]
        lines.append(cells)
        print(*cells, file=sys.stderr, flush=True)
        reader.model.close()
    print(table(["methods", "kv MiB", f"KL after {n} tokens", "perplexity", "look-ups"], lines))


if __name__ == "__main__":
    main()
