"""Measures transformers on a checkpoint as it is stored; see harness.py for what is printed.

PYTHON benchmarks/peers/run_transformers.py FOLDER [--prompt 512] ...
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from harness import Prompts, Runtime, describe, measure, parse
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer


def bytes_per_token(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if "embed_tokens" not in name]  # noqa: SIM118
            total += sum(file.get_tensor(name).nbytes for name in names)
    return total


class Clock(BaseStreamer):
    """When each token came; the first entry is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def main() -> None:
    arguments = parse(argparse.ArgumentParser(description=__doc__))
    if arguments.describe:
        describe(bytes_per_token(Path(arguments.model)), "torch", "transformers")
        return
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def generate(prompts: Prompts, new: int) -> float:
        ids, clock = torch.tensor(prompts), Clock()
        began = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, streamer=clock)
        return clock.times[1] - began

    measure(Runtime(generate, model.config.vocab_size), arguments)


if __name__ == "__main__":
    main()
