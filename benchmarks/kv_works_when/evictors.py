"""Which tokens a method keeps, at equal numbers of them: on the embedded model, prompts that are long, and answers that
are.

    .venv/bin/python benchmarks/kv_works_when/evictors.py [--keep 512] [--texts 4] [--methods 'tova(keep=512)' ...]

KL divergence of the next-token distributions from those of the exact cache on held-out code, the right token being
decoded each time: the 64 tokens behind a prompt of 3000, and the last 512 of 1536 behind a prompt of 512; hidden
numbers that are found at 1000 tokens; and tokens that a head has after the last text.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from benchmarks.common import held_out, table
from benchmarks.kv import Question, divergence, follow, interval, questions

import tightfit
from tightfit import zoo
from tightfit.kv.paged import PagedCache
from tightfit.lab.reader import Reader
from tightfit.zoo.presets import BOS
from tightfit.zoo.tasks import Material

CASES = {"3000 + 64": (3000, 64), "512 + 1536": (512, 1536)}  # tokens of the prompt, and that follow
COMPARED = 512


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", type=int, default=512)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--questions", type=int, default=16)
    options = parser.parse_args(arguments)
    keep, half = options.keep, options.keep // 2
    methods = options.methods or [
        f"window(keep={keep})",
        f"h2o(keep={keep})",
        f"snapkv(keep={keep})",
        f"tova(keep={keep})",
        f"scissorhands(keep={keep})",
        f"corm(keep={keep})",
        f"morphkv(keep={keep})",
        f"morphkv(keep={keep},fusion=max)",
        *(f"scope(keep={keep},output={half},update={way})" for way in ("slide", "adaptive", "discontinuous")),
    ]
    texts, _ = held_out(zoo.path())
    tokenizer = tightfit.load("nano", "2GiB").tokenizer._tokenizer
    material = Material.of_text(tokenizer, "".join(texts))
    asked = questions(material, "needles", 1000, options.questions)
    rng, rows = random.Random(0), {}
    for name, (prompt, following) in CASES.items():
        starts = [rng.randrange(len(material.code) - prompt - following) for _ in range(options.texts)]
        ids = [[BOS, *material.code[start : start + prompt + following].tolist()] for start in starts]
        rows[name] = [Question(each[:prompt], each[prompt : prompt + following]) for each in ids]

    exact: dict[str, list[torch.Tensor]] = {}
    lines = []
    for kv in ("none", *methods):
        print(kv, file=sys.stderr, flush=True)
        with tightfit.load("nano", "2GiB", context=4096, kv=kv, threads=1) as model:
            reader = Reader(model)
            right = sum(bool((follow(reader, q).argmax(-1) == torch.tensor(q.answer)).all()) for q in asked)
            logits = {name: [follow(reader, row)[-COMPARED:] for row in each] for name, each in rows.items()}
            exact = exact or logits
            cache = model.borrow_engine().cache
            kept = torch.stack([p.lengths[0] for p in cache.layers]).float() if isinstance(cache, PagedCache) else None
            losses = [[divergence(a, b) for a, b in zip(exact[name], logits[name], strict=True)] for name in CASES]
            lines.append(
                [
                    f"`{kv}`",
                    "all" if kept is None else f"{float(kept.mean()):.0f}",
                    f"{reader.kv_bytes()[0] / 2**20:.2f}",
                    *(f"{sum(part) / len(part):.4f} ± {interval(part):.4f}" for part in losses),
                    f"{right} of {len(asked)}",
                ]
            )
    print(table(["methods", "tokens kept", "kv MiB", *(f"KL, {name}" for name in CASES), "numbers found"], lines))


if __name__ == "__main__":
    main()
