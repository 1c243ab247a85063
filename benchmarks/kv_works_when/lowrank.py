"""What fewer features and heads cost the embedded model, fitted with one held-out text and measured on another.

    .venv/bin/python benchmarks/kv_works_when/lowrank.py [METHODS...]

What was found is kept in the user's cache folder, so a second run is short. Quality is measured as
`benchmarks/kv.py` does: hidden numbers found after 1000 tokens, and the KL divergence from the exact cache on 32 tokens
after prompts of 1000.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import held_out, machine, table
from benchmarks.kv import Question, divergence, follow, interval, questions

import tightfit
from tightfit import zoo
from tightfit.errors import CheckpointError
from tightfit.lab.reader import Reader
from tightfit.zoo.presets import BOS
from tightfit.zoo.tasks import Material

METHODS = (
    "int8",
    "int4",
    "gqa",
    "cskv(keys=0.4,values=0.4)",
    "cskv",
    "matryoshka(share=0.75)",
    "matryoshka",
    "matryoshka(share=0.4)",
    "matryoshka(share=0.4,steps=0)",
)
TOKENS, FOLLOWED, TEXTS, QUESTIONS = 1000, 32, 12, 16
FITTED_WITH = 1 << 17  # characters


def loaded(kv: str, text: str) -> tightfit.Model:
    """The embedded model with a cache that is fitted first if it must be."""
    try:
        return tightfit.load("nano", "2GiB", context=2048, kv=kv)
    except CheckpointError:
        with tightfit.load("nano", "4GiB", context=1024) as model:
            model.fit(kv, text)
    return tightfit.load("nano", "2GiB", context=2048, kv=kv)


def main(methods: list[str]) -> None:
    began = time.monotonic()
    texts, _ = held_out(zoo.path())
    whole = "".join(texts)
    fitted_with, measured_on = whole[:FITTED_WITH], whole[FITTED_WITH:]
    lines: list[list[str]] = []
    exact = []
    for kv in ("none", *(methods or METHODS)):
        with loaded(kv, fitted_with) as model:
            material = Material.of_text(model.tokenizer._tokenizer, measured_on)
            rng, reader = random.Random(0), Reader(model)
            asked = questions(material, "needles", TOKENS, QUESTIONS)
            found = sum(follow(reader, one).argmax(-1).tolist() == one.answer for one in asked)
            starts = [rng.randrange(len(material.code) - TOKENS - FOLLOWED) for _ in range(TEXTS)]
            rows = [[BOS, *material.code[start : start + TOKENS + FOLLOWED].tolist()] for start in starts]
            logits = [follow(reader, Question(row[:TOKENS], row[TOKENS:])) for row in rows]
            exact = exact or logits
            losses = [divergence(a, b) for a, b in zip(exact, logits, strict=True)]
            reserved, _ = reader.kv_bytes()
            loss = f"{statistics.mean(losses):.4f} ± {interval(losses):.4f}"
            lines.append([f"`{kv}`", f"{reserved / 2**20:.2f}", loss, f"{found} of {QUESTIONS}"])
            print(*lines[-1], file=sys.stderr, flush=True)
    print(machine(2, "torch"))
    print(table(["methods", "kv MiB reserved for 2048 tokens", "KL, nats", "numbers found"], lines))
    print(f"\nMeasured in {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    main(sys.argv[1:])
