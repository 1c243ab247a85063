"""Measures airllm, which reads a checkpoint layer by layer from the disk; see harness.py for what is printed.

PYTHON benchmarks/peers/run_airllm.py FOLDER --split FOLDER [--prompt 512] ...

It reads copies of the layers, as large as the checkpoint, which it first writes to the folder that --split names; those
that are there already are used. That time is not part of what is measured.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from airllm import AutoModel
from harness import Prompts, Runtime, describe, measure, parse
from run_transformers import Clock, bytes_per_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", required=True)
    arguments = parse(parser)
    if arguments.describe:
        describe(bytes_per_token(Path(arguments.model)), "airllm", "torch", "transformers")
        return
    torch.set_num_threads(arguments.threads)
    longest = max(arguments.prompt + arguments.new + 1, arguments.warm + 2)
    model = AutoModel.from_pretrained(
        arguments.model, device="cpu", layer_shards_saving_path=arguments.split, max_seq_len=longest
    )

    def generate(prompts: Prompts, new: int) -> float:
        ids, clock = torch.tensor(prompts), Clock()
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, use_cache=True, streamer=clock)
        return clock.times[1] - began

    measure(Runtime(generate, model.config.vocab_size), arguments)


if __name__ == "__main__":
    main()
