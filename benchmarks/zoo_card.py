"""The numbers of a zoo model's card: loss on held-out files, and accuracy of looking up what was read.

    python benchmarks/zoo_card.py [FOLDER] [--questions 24] [--threads 2]

Runs the model through transformers in float32, so that the card does not depend on this project's own engine. Prints
Markdown. Held-out files are those named in the folder's ``heldout.json`` that this Python's installation has.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from benchmarks.common import held_out, machine
from tokenizers import Tokenizer

from tightfit import zoo
from tightfit.zoo import evaluate
from tightfit.zoo.tasks import Material

LENGTHS = {
    "dictionary": (400, 800, 1500, 2000, 3000, 3800),
    "needles": (400, 800, 1500, 2000, 3000, 3800),
    "chain": (100, 200, 400, 800),
    "copy": (200, 400, 800, 1500),  # the text; its beginning is read a second time
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=zoo.path())
    parser.add_argument("--questions", type=int, default=24, help="texts for each length, one question about each")
    parser.add_argument("--file-tokens", type=int, default=1024, help="tokens read of each held-out file")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)

    @torch.no_grad()
    def logits(ids: list[int]) -> torch.Tensor:
        scores: torch.Tensor = model(torch.tensor([ids])).logits[0]
        return scores

    began = time.monotonic()
    texts, named = held_out(options.folder)
    rows = [next(evaluate.windows([text], tokenizer, options.file_tokens)) for text in texts]
    loss = evaluate.validation_loss(logits, tokenizer, rows)
    print(machine(options.threads, "torch", "transformers"))
    print("Computed in float32.\n")
    print(f"Held-out text ({len(texts)} of {named} files are installed here; the first {options.file_tokens} tokens of")
    print(f"each, {loss.tokens} tokens, {loss.bytes} bytes): {loss.nats_per_token:.3f} nats per token,")
    print(f"{loss.bits_per_byte:.3f} bits per byte.\n")

    material = Material.of_text(tokenizer, "".join(texts))
    print("| task | tokens read (mean) | answers exactly right | share |")
    print("|---|---:|---:|---:|")
    for task, lengths in LENGTHS.items():
        for tokens in lengths:
            got = evaluate.lookup_accuracy(logits, material, task, tokens, options.questions)
            share = f"{100 * got.correct / got.asked:.0f}%"
            print(f"| {task} | {got.tokens:.0f} | {got.correct} of {got.asked} | {share} |", flush=True)
    print(f"\nMeasured in {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    main()
