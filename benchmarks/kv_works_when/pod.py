"""What it costs the embedded model that layers share the keys of distant tokens, beside letting go of as many bytes.

    .venv/bin/python benchmarks/kv_works_when/pod.py [--methods 'pod(keep=128)' ...] [--questions 12] [--texts 6]

Methods are fitted with one held-out text and measured on another, as `benchmarks/kv.py` does: bytes of a cache of 4096
tokens, hidden numbers found in prompts of several lengths, and the KL divergence from the exact cache on the 64 tokens
after prompts of 3900. What was found is kept in the user's cache folder.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import held_out, table
from benchmarks.kv import CONTEXT, FOLLOWED, Question, divergence, follow, interval, questions

import tightfit
from tightfit import zoo
from tightfit.errors import CheckpointError
from tightfit.lab.reader import Reader
from tightfit.zoo.presets import BOS
from tightfit.zoo.tasks import Material

METHODS = (
    "pod(keep=128)",
    "pod",
    "pod(keep=128,similar=0.7)",
    "pod(keep=128,similar=0.5)",
    "pod(keep=128)+int4",
    "window(keep=2700)",
    "h2o(keep=2700)",
    "snapkv(keep=2700)",
)
LENGTHS, TEXT = [1000, 2000, 3700], 3900  # tokens of prompts
FITTED_WITH = 1 << 17  # characters


def loaded(kv: str, text: str) -> tightfit.Model:
    """The embedded model with a cache that is fitted first if it must be."""
    try:
        return tightfit.load("nano", "2GiB", context=CONTEXT, kv=kv)
    except CheckpointError:
        with tightfit.load("nano", "2GiB", context=CONTEXT) as model:
            print(*model.fit(kv, text)["lines"], sep="\n", file=sys.stderr)
    return tightfit.load("nano", "2GiB", context=CONTEXT, kv=kv)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--questions", type=int, default=12, help="of each length")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--texts", type=int, default=6)
    options = parser.parse_args()
    whole = "".join(held_out(zoo.path())[0])
    fitted_with, measured_on = whole[:FITTED_WITH], whole[FITTED_WITH:]
    material = Material.of_text(tightfit.load("nano", "2GiB").tokenizer._tokenizer, measured_on)
    asked = [questions(material, "needles", length, options.questions) for length in options.lengths]
    rng, rows = random.Random(0), []
    for start in (rng.randrange(len(material.code) - TEXT - FOLLOWED) for _ in range(options.texts)):
        ids = [BOS, *material.code[start : start + TEXT + FOLLOWED].tolist()]
        rows.append(Question(ids[:TEXT], ids[TEXT : TEXT + FOLLOWED]))
    lines: list[list[str]] = []
    exact = []
    for kv in ("none", *options.methods):
        with loaded(kv, fitted_with) as model:
            reader = Reader(model)
            logits = [follow(reader, row) for row in rows]
            right = [sum(follow(reader, q).argmax(-1).tolist() == q.answer for q in each) for each in asked]
            exact = exact or logits
            losses = [divergence(a, b) for a, b in zip(exact, logits, strict=True)]
            cells = [f"`{kv}`", f"{reader.kv_bytes()[0] / 2**20:.2f}"]
        cells += [f"{statistics.mean(losses):.4f} ± {interval(losses):.4f}", ", ".join(map(str, right))]
        lines.append(cells)
        print(*cells, file=sys.stderr, flush=True)
    found = f"hidden numbers found of {options.questions}, at {', '.join(map(str, options.lengths))} tokens"
    print(table(["methods", "MiB reserved", f"KL after {TEXT} tokens", found], lines))


if __name__ == "__main__":
    main()
