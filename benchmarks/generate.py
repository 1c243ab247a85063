"""`tightfit run` beside transformers: start-up, prefill and decoding rates, and peak memory, on one model and machine.

    .venv/bin/python benchmarks/generate.py [--model FOLDER] [--prompt 512] [--new 32] [--repeat 3] [--out FILE.md]

Without --model a random llama of 1.05 billion parameters in bfloat16 is written to a temporary folder (2.1 GB). Every
run is a process of its own, the systems take turns, and the table gives medians. `start` is from the start of the
process until the prompt is being computed; peak memory is what the operating system saw (VmHWM). The limits: decoding
reads every weight once for each token, so memory bandwidth over bytes of weights bounds it; prefill is bounded by
torch's own bfloat16 matrix products.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import checked, command, machine, matmul_rate, table
from tests import random_model
from tests.measure import run_measured

from tightfit.plan.profile import measure_bandwidth

TRANSFORMERS = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer
folder, prompt, new, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
class Clock(BaseStreamer):
    def __init__(self): self.times = []
    def put(self, value): self.times.append(time.time())
    def end(self): pass
clock = Clock()
ids = tokenizer(open(prompt).read(), return_tensors="pt").input_ids
model.generation_config.eos_token_id = None
model.generation_config.pad_token_id = 0
before = time.time()
with torch.inference_mode():
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, streamer=clock)
first, last = clock.times[1], clock.times[-1]
print(json.dumps({"prefill": ids.shape[1] / (first - before), "decode": (new - 1) / (last - first), "began": before}))
"""
COLUMNS = ("system", "weights", "budget MiB", "peak MiB", "start s", "prefill tok/s", "decode tok/s", "of bandwidth")


def tightfit_run(folder: Path, prompt: Path, new: int, threads: int, memory: str, context: int) -> dict[str, float]:
    """One run; rates from its receipt, everything else from outside."""
    command = [sys.executable, "-m", "tightfit", "run", folder, "--file", prompt, "-n", new, "--ignore-eos", "--json"]
    command += ["--memory", memory, "--context", context, "--temperature", "0", "--threads", threads]
    began = time.time()
    done = checked(run_measured([str(part) for part in command], timeout=900))
    total = time.time() - began
    receipt = json.loads(done.stdout)["receipt"]
    decoding = (receipt["new_tokens"] - 1) / receipt["decode_tokens_per_s"]
    return {
        "start": total - decoding - receipt["time_to_first_token_s"],
        "prefill": receipt["prefill_tokens_per_s"],
        "decode": receipt["decode_tokens_per_s"],
        "peak": done.peak_bytes / 2**20,
        "budget": receipt["budget_bytes"] / 2**20,
        "weights": receipt["accounts"]["weights"]["peak_bytes"],
    }


def transformers_run(folder: Path, prompt: Path, new: int, threads: int) -> dict[str, float]:
    began = time.time()
    command = [sys.executable, "-c", TRANSFORMERS, folder, prompt, new, threads]
    done = checked(run_measured([str(part) for part in command], timeout=900))
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return row | {"start": row["began"] - began, "peak": done.peak_bytes / 2**20, "weights": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder in bfloat16")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=32, help="tokens")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budgets", nargs="+", default=["3GiB", "1500MiB", "900MiB"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.model or random_model.write(Path(temporary) / "1b", "1b")
        prompt = Path(temporary) / "prompt.txt"
        prompt.write_text("#" + "7" * (arguments.prompt - 2))  # a token each, after <|bos|>
        context = arguments.prompt + arguments.new
        new, threads = arguments.new, arguments.threads
        systems: dict[str, Callable[[], dict[str, float]]] = {
            "transformers": lambda: transformers_run(folder, prompt, new, threads)
        }
        for memory in arguments.budgets:
            systems[f"tightfit --memory {memory}"] = lambda memory=memory: tightfit_run(  # type: ignore[misc]
                folder, prompt, new, threads, memory, context
            )
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
        for turn in range(arguments.repeat):
            for name, run in systems.items():
                rows[name].append(run())
                print(f"{turn + 1}/{arguments.repeat} {name}", file=sys.stderr)
        bandwidth = measure_bandwidth(threads).bytes_per_s
        products = matmul_rate(threads)
    lines = []
    for name, runs in rows.items():
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        share = row["decode"] * row["weights"] / bandwidth
        budget = f"{row['budget']:.0f}" if "budget" in row else "none"
        lines.append(
            (
                name,
                f"{row['weights'] / 2**20:.0f} MiB",
                budget,
                f"{row['peak']:.0f}",
                f"{row['start']:.1f}",
                f"{row['prefill']:.0f}",
                f"{row['decode']:.1f}",
                f"{share:.0%}",
            )
        )
    text = f"""# `tightfit run` beside transformers

Model: {folder.name}. {arguments.prompt} prompt tokens, {new} new ones, batch 1, {threads} threads, median of \
{arguments.repeat}

{table(COLUMNS, lines)}

Limits measured in the same call: memory {bandwidth / 1e9:.1f} GB/s with {threads} threads, torch's bfloat16 products
{products / 1e9:.0f} GFLOP/s.
Machine: {machine(threads, "torch", "transformers")}

Command: `{command()}`
"""
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
