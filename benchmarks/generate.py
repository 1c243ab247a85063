"""`tightfit run` beside transformers: prefill and decode rates, start-up, and peak memory, on the same model and machine.

    .venv/bin/python benchmarks/generate.py [--model FOLDER] [--prompt 512] [--new 32] [--repeat 3] [--out FILE]

Without --model a random llama of 1.05 billion parameters is written to a temporary folder (2.1 GB) and used. Each row is
processes of their own, taken in turn; the table gives medians. Peak memory is what the operating system saw (VmHWM).
Limits: decoding reads every weight once for each token, so the memory bandwidth that `tightfit doctor` measures bounds
it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import random_model
from measure import run

TRANSFORMERS = """
import json, sys, time
started = time.time()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer
folder, prompt_file, new = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(2)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
class Clock(BaseStreamer):
    def __init__(self): self.times = []
    def put(self, value): self.times.append(time.time())
    def end(self): pass
clock = Clock()
ids = tokenizer(open(prompt_file).read(), return_tensors="pt").input_ids
model.generation_config.eos_token_id = None
model.generation_config.pad_token_id = 0
before = time.time()
with torch.inference_mode():
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, streamer=clock)
first, last = clock.times[1], clock.times[-1]
print(json.dumps({"prefill": ids.shape[1] / (first - before), "decode": (new - 1) / (last - first), "first": first}))
"""


def tightfit_row(folder: Path, prompt: Path, new: int, memory: str, context: int) -> dict[str, float]:
    code = "from tightfit.cli.main import main; main()"
    command = [sys.executable, "-c", code, "run", str(folder), "--file", str(prompt), "-n", str(new), "--ignore-eos"]
    command += ["--memory", memory, "--context", str(context), "--temperature", "0", "--json"]
    began = time.time()
    result = run(command)
    if result.returncode:
        raise SystemExit(result.stderr)
    receipt = json.loads(result.stdout)["receipt"]
    prefill_and_decode = receipt["prompt_tokens"] / receipt["prefill_tokens_per_s"]
    decode = (receipt["new_tokens"] - 1) / receipt["decode_tokens_per_s"]
    total = time.time() - began
    return {
        "prefill": receipt["prefill_tokens_per_s"],
        "decode": receipt["decode_tokens_per_s"],
        "first": total - decode,
        "start": total - decode - prefill_and_decode,
        "peak": result.peak_bytes / 2**20,
        "budget": receipt["budget_bytes"] / 2**20,
    }


def transformers_row(folder: Path, prompt: Path, new: int) -> dict[str, float]:
    began = time.time()
    result = run([sys.executable, "-c", TRANSFORMERS, str(folder), str(prompt), str(new)])
    if result.returncode:
        raise SystemExit(result.stderr)
    row = json.loads(result.stdout.splitlines()[-1])
    row["first"] -= began
    row["start"] = row["first"] - 1 / row["prefill"] * 1
    row["peak"] = result.peak_bytes / 2**20
    return row
