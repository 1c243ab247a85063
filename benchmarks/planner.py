"""What the planner predicts beside what is measured: memory, prompts and new tokens, at budgets from one in which the
weights fit as they are to the smallest that works.

    .venv/bin/python benchmarks/planner.py MODEL [MODEL ...] [--budgets 12] [--context 2048] [--new 24] [--measure]
        [--smallest] [--out FILE.md] [--json]

MODEL is a checkpoint in bfloat16 or what `tightfit compress` wrote. Budgets are spread evenly by their ratio. Each is a
process of its own, measured from outside, whose prompt fills the context but for the new tokens; the page cache was
asked to forget the files. Predictions are those on its receipt: they follow from the plan and the record of this
machine, which `--measure` makes anew first. A ratio is predicted over measured.

--smallest: also whether the smallest budget that is stated works, and 5% less is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import command, commit, in_page_cache, machine, table, tightfit, wait_until_idle
from tests.measure import run_measured

MiB = 2**20
UNLIMITED = "1TiB"
REFUSED = 4  # exit status
SLACK = 8 * MiB  # by which the largest budget is more than what is needed
PATIENCE = 20.0  # seconds to wait for an idle machine before a run


@dataclass(frozen=True)
class Row:
    """One budget. Bytes, and seconds of the prompt and of a new token."""

    model: str
    budget: int
    formats: str
    chunk: int
    streamed: float
    predicted_peak: int
    peak: int
    predicted_prefill: float
    prefill: float
    predicted_decode: float
    decode: float

    @property
    def ratios(self) -> tuple[float, float, float]:
        return (
            self.predicted_peak / self.peak,
            self.predicted_prefill / self.prefill,
            self.predicted_decode / self.decode,
        )


def budgets(model: Path, size: list[Any], count: int) -> list[int]:
    """From what the own precision needs down to the smallest."""
    found = tightfit("plan", model, "--memory", UNLIMITED, *size)[0]
    top = sum(found["plan"]["accounts"].values()) + SLACK
    least = min(level["smallest_bytes"] for level in found["precisions"]) + SLACK
    return [round(top * (least / top) ** (step / max(count - 1, 1))) for step in range(count)]


def measure(model: Path, budget: int, size: list[Any], prompt: str, new: int) -> Row:
    in_page_cache(model, False)
    wait_until_idle(PATIENCE)
    answer, peak = tightfit("run", model, "--memory", budget, *size, "-p", prompt, "-n", new, "--ignore-eos")
    receipt = answer["receipt"]
    plan, predicted = receipt["plan"], receipt["predicted"]
    if predicted is None:
        raise SystemExit("this machine was not measured: add --measure")
    whole = plan["outer"]["nbytes"] + sum(layer["nbytes"] for layer in plan["layers"])
    held = plan["accounts"]["weights"] if plan["buffers"] else whole
    formats = Counter(layer["format"] for layer in plan["layers"])
    return Row(
        model=model.name,
        budget=budget,
        formats=", ".join(f"{name} x{count}" for name, count in formats.items()),
        chunk=plan["chunk"],
        streamed=max(1 - held / whole, 0.0),
        predicted_peak=receipt["predicted_bytes"],
        peak=peak,
        predicted_prefill=predicted["prefill"]["predicted_s"],
        prefill=predicted["prefill"]["measured_s"],
        predicted_decode=predicted["decode"]["predicted_s"],
        decode=predicted["decode"]["measured_s"],
    )


def smallest(model: Path, size: list[Any], prompt: str, new: int) -> str:
    """Whether the smallest budget that is stated works, and 5% less is refused."""

    def run(budget: int | str) -> Any:
        text = ["run", model, *size, "-p", prompt, "-n", new, "--ignore-eos", "--json", "--memory", budget]
        return run_measured([sys.executable, "-m", "tightfit", *map(str, text)], timeout=900)

    stated = json.loads(run("100MiB").stdout)["smallest_bytes"]
    works, less = run(stated), run(round(0.95 * stated))
    kept = works.exit_code == 0 and works.peak_bytes <= stated
    return (
        f"{model.name}: the smallest budget stated is {stated / MiB:.1f} MiB; it "
        f"{'works' if kept else 'DOES NOT WORK'} (peak {works.peak_bytes / MiB:.1f} MiB), and 5% less is "
        f"{'refused' if less.exit_code == REFUSED else 'NOT REFUSED'}."
    )


def report(rows: list[Row], notes: list[str], threads: int, seconds: float) -> str:
    columns = ["model", "budget MiB", "weights", "streamed", "chunk", "peak predicted", "measured", "ratio"]
    columns += ["prompt predicted s", "measured", "ratio", "token predicted ms", "measured", "ratio"]
    lines = []
    for row in rows:
        peak, prefill, decode = (f"{ratio:.3f}" for ratio in row.ratios)
        lines.append(
            [
                row.model,
                f"{row.budget / MiB:.0f}",
                row.formats,
                f"{row.streamed:.0%}",
                str(row.chunk),
                *(f"{nbytes / MiB:.1f}" for nbytes in (row.predicted_peak, row.peak)),
                peak,
                *(f"{seconds:.2f}" for seconds in (row.predicted_prefill, row.prefill)),
                prefill,
                *(f"{1000 * seconds:.1f}" for seconds in (row.predicted_decode, row.decode)),
                decode,
            ]
        )
    sums = []
    for name, ratios in zip(("peak", "prompt", "token"), zip(*(row.ratios for row in rows), strict=True), strict=True):
        off = [abs(ratio - 1) for ratio in ratios]
        sums.append([name, f"{statistics.median(off):.1%}", f"{max(off):.1%}", f"{min(ratios):.3f}"])
    return f"""# What is predicted, and what is measured

{table(columns, lines)}

How far predictions are off:

{table(["", "median", "worst", "smallest ratio"], sums)}

{chr(10).join(notes)}

Machine: {machine(threads, "torch")} tightfit at {commit()}.
Command: `{command()}`, {seconds:.0f} s.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--budgets", type=int, default=12)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--measure", action="store_true", help="measure this machine anew")
    parser.add_argument("--smallest", action="store_true")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help="write the table to a file")
    arguments = parser.parse_args()
    began = time.monotonic()
    size = ["--context", arguments.context, "--threads", arguments.threads]
    # The first is <|bos|>, and each character is a token of these models.
    prompt = "#" + "7" * (arguments.context - arguments.new - 2)
    if arguments.measure:
        wait_until_idle(PATIENCE)
        tightfit("doctor", "--measure")
    rows, notes = [], []
    for model in arguments.models:
        for budget in budgets(model, size, arguments.budgets):
            rows.append(measure(model, budget, size, prompt, arguments.new))
            found = ", ".join(f"{ratio:.2f}" for ratio in rows[-1].ratios)
            print(f"{model.name}, {budget / MiB:.0f} MiB, {rows[-1].formats}: {found}", file=sys.stderr)
        if arguments.smallest:
            notes.append(smallest(model, size, prompt, arguments.new))
    text = report(rows, notes, arguments.threads, time.monotonic() - began)
    print(json.dumps({"rows": [asdict(row) for row in rows], "smallest": notes}, indent=1) if arguments.json else text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
