"""What selectors find of what was hidden, and how much they read for that, on the embedded model.

    .venv/bin/python benchmarks/kv_works_when/chosen_tokens.py [--methods 'quest(tokens=256)' ...] [--questions 12]

Prints a table: look-ups answered of as many (numbers hidden in code, and a dictionary), the mean KL divergence of the
next 64 tokens' distributions from the exact cache's, and what one more token reads of keys, values and indexes. An
answer counts if every token of it is the most likely one. What methods must know of the model is found first, with the
model's held-out texts.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import held_out, table
from benchmarks.kv import CONTEXT, FOLLOWED, Question, divergence, measure, questions

import tightfit
from tightfit import zoo
from tightfit.lab.reader import Reader
from tightfit.zoo.presets import BOS
from tightfit.zoo.tasks import Material

METHODS = (
    "window(keep=256)",
    "h2o(keep=256)",
    "snapkv(keep=256)",
    "quest(tokens=256)",
    "recycled(tokens=256)",
    "clusterkv(tokens=256)",
    "squeezed(tokens=256)",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--questions", type=int, default=12, help="for each task")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2000, help="of prompts")
    options = parser.parse_args(arguments)

    texts, _ = held_out(zoo.path())
    tokenizer = tightfit.load("nano", "2GiB").tokenizer._tokenizer
    material = Material.of_text(tokenizer, "".join(texts))
    tasks = [(task, options.tokens) for task in ("needles", "dictionary")]
    asked = {(task, tokens): questions(material, task, tokens, options.questions) for task, tokens in tasks}
    rng, rows = random.Random(0), []
    for _ in range(options.texts):
        start = rng.randrange(len(material.code) - options.tokens - FOLLOWED)
        ids = [BOS, *material.code[start : start + options.tokens + FOLLOWED].tolist()]
        rows.append(Question(ids[: options.tokens], ids[options.tokens : options.tokens + FOLLOWED]))

    exact, lines = None, []
    for kv in ("none", *options.methods):
        print(kv, file=sys.stderr, flush=True)
        reader = Reader(tightfit.load("nano", "2GiB", context=CONTEXT, kv=kv))
        found = measure(reader, asked, rows)
        exact = exact or found["logits"]
        losses = [divergence(a, b) for a, b in zip(exact, found["logits"], strict=True)]
        right = [str(found["right"][f"{task}/{tokens}"]) for task, tokens in tasks]
        lines.append([f"`{kv}`", *right, f"{sum(losses) / len(losses):.3f}", f"{found['read'] / 1024:.0f}"])
        reader.model.close()
    print(table(["methods", "hidden numbers", "dictionary", "KL, nats", "KiB read"], lines))


if __name__ == "__main__":
    main()
