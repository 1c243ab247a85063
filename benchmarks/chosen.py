"""Chosen plans against uniform formats on the embedded model: divergence, memory, and speed in equal memory.

    python benchmarks/chosen.py [--out FILE.md] [--json] [--tokens 4096] [--budgets 4] [--speed]

At the size of each uniform format, and at budgets between the smallest and the largest, the plan that --prefer quality
chooses (its layers rounded by measured sensitivities: they are measured first, on other text) stands beside every
uniform format whose weights take no more. Divergence is KL(exact || plan) in nats per token, as formats.py measures it,
by decoding, on beginnings of held-out files. With --speed the plan of --prefer speed stands beside them too, with
tokens per second of decoding: run that on a quiet machine. Budgets are those of the weights alone: all else is equal.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import quantiles

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import command, commit, held_out, machine, table
from benchmarks.formats import CONTEXT, WINDOW, Text
from tokenizers import Tokenizer

from tightfit import zoo
from tightfit.api import Model
from tightfit.budget.units import MiB
from tightfit.engine.engine import Engine
from tightfit.engine.generate import Generator
from tightfit.engine.numerics import numerics
from tightfit.engine.opening import Opened, Wish, measure_machine, open_model
from tightfit.engine.sensitivity import calibration_text, measure_sensitivity
from tightfit.engine.start import fit_plan, search_for, start
from tightfit.plan.schema import OWN, Plan, Preference
from tightfit.plan.search import LEVELS, Search
from tightfit.plan.sizes import Constraints
from tightfit.zoo import evaluate

BUDGET = 4 << 30  # of the process: what is compared is the weights
CHUNK = 128
RUNTIME = 300 << 20
PROMPT, NEW, ROUNDS = "def read(", 200, 15


@dataclass(frozen=True)
class Measured:
    """``weights_bytes`` of the plan; ``divergence`` in nats per token; ``speed`` in tokens per second."""

    budget: int
    name: str
    formats: str
    weights_bytes: int
    predicted: float
    divergence: float
    speed: str


@contextmanager
def running(opened: Opened, plan: Plan) -> Iterator[tuple[Model, Engine]]:
    fitted = fit_plan(opened.checkpoint, opened.spec, plan.model_copy(update={"budget": BUDGET}))
    engine, ledger = start(opened.checkpoint, opened.spec, fitted)
    requests = opened.requests(CONTEXT)
    yield Model(opened.checkpoint, fitted, requests, Generator(engine, requests.tokenizer), ledger), engine
    engine.cache.close()
    ledger.release()


def described(plan: Plan) -> str:
    """The formats, and of how many groups each is."""
    counts = Counter([plan.outer.format, *(layer.format for layer in plan.layers)])
    return ", ".join(f"{fmt} x {counts[fmt]}" for fmt in LEVELS if counts[fmt])


def search(opened: Opened, constraints: Constraints, prefer: Preference, budget: int) -> Search:
    return search_for(opened.checkpoint, opened.spec, replace(constraints, prefer=prefer, budget=budget))


def speed(model: Model) -> float:
    """Tokens per second of decoding."""
    began = None
    for _ in model.stream(PROMPT, max_new_tokens=NEW, temperature=0.0, ignore_eos=True):
        began = began or time.perf_counter()
    return NEW / (time.perf_counter() - (began or 0.0))


def speeds(opened: Opened, plans: dict[str, Plan]) -> dict[str, str]:
    """Tokens per second of each plan, the median of some rounds in which they take turns, and its quartiles: other work
    and warmth are the same for all."""
    rates: dict[str, list[float]] = {formats: [] for formats in plans}
    with ExitStack() as models:
        loaded = {formats: models.enter_context(running(opened, plan))[0] for formats, plan in plans.items()}
        for _ in range(ROUNDS):
            for formats, model in loaded.items():
                rates[formats].append(speed(model))
    quartiles = {formats: quantiles(found, n=4) for formats, found in rates.items()}
    return {formats: f"{middle:.0f} ({low:.0f} to {high:.0f})" for formats, (low, middle, high) in quartiles.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of held-out text")
    parser.add_argument("--budgets", type=int, default=4, help="beside those of the uniform formats")
    parser.add_argument("--speed", action="store_true", help="also --prefer speed, and tokens per second")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help="write the table to a file")
    arguments = parser.parse_args()
    began = time.monotonic()
    texts, _ = held_out(zoo.path())
    tokenizer = Tokenizer.from_file(str(zoo.path() / "tokenizer.json"))
    # The beginnings of the first files are what sensitivities are measured with.
    rows = [next(evaluate.windows([text], tokenizer, WINDOW + 1)) for text in texts[::-1][: arguments.tokens // WINDOW]]
    text = Text.of(rows, arguments.threads)
    wish = Wish(zoo.DEFAULT, BUDGET, CONTEXT, threads=arguments.threads)
    opened = open_model(wish)
    measured = measure_sensitivity(wish, opened, calibration_text(), tokens=1024)
    if arguments.speed:
        measure_machine(wish, opened)
    types = numerics({info.dtype for info in opened.checkpoint.tensors.values()}, "int8")
    constraints = Constraints(BUDGET, CONTEXT, 1, arguments.threads, types, chunk=CHUNK)
    every = search(opened, constraints, "quality", BUDGET)
    uniform = {level: every.uniform(level, CHUNK, RUNTIME) for level in every.levels()}
    low, high = (uniform[level].total for level in (LEVELS[-1], OWN))
    losses: dict[str, float] = {}
    plans: dict[str, Plan] = {}

    def result(budget: int, name: str, plan: Plan) -> Measured:
        formats = described(plan)
        if formats not in losses:
            with running(opened, plan) as (_, engine):
                _, losses[formats] = text.losses(engine, decode=True)
            plans[formats] = plan
        weights = plan.accounts["weights"]
        return Measured(budget, name, formats, weights, every.nats(plan), losses[formats], "")

    between = {low + (high - low) * step // (arguments.budgets + 1) for step in range(1, arguments.budgets + 1)}
    results = []
    for budget in sorted(between | {plan.total for plan in uniform.values()}):
        left = budget - low + uniform[LEVELS[-1]].accounts["weights"]
        results.append(result(left, "**quality**", search(opened, constraints, "quality", budget).best(RUNTIME)))
        if arguments.speed:
            results.append(result(left, "**speed**", search(opened, constraints, "speed", budget).best(RUNTIME)))
        results += [result(left, level, plan) for level, plan in uniform.items() if plan.total <= budget]
        print(f"{left / MiB:.2f} MiB", file=sys.stderr)
    if arguments.speed:
        measured_speeds = speeds(opened, plans)
        results = [replace(each, speed=measured_speeds[each.formats]) for each in results]
    columns = ("weights at most, MiB", "plan", "formats", "MiB", "KL predicted", "KL measured", "tokens/s")
    lines = [
        (
            f"{each.budget / MiB:.2f}",
            each.name,
            each.formats,
            f"{each.weights_bytes / MiB:.2f}",
            f"{each.predicted:.5f}",
            f"{each.divergence:.5f}",
            each.speed,
        )
        for each in results
    ]
    sums = {level: sum(of_group[level] for of_group in measured["weights"].values()) for level in LEVELS[1:]}
    whole = {described(plan): level for level, plan in uniform.items()}
    ratios = ", ".join(
        f"{level} {sums[level] / losses[formats]:.2f}"
        for formats, level in whole.items()
        if level in sums and formats in losses and losses[formats]
    )
    written = f"""# Chosen plans against uniform formats

The embedded model on {sum(len(row) - 1 for row in rows)} tokens of {len(rows)} held-out files; sensitivities were
measured on {measured["tokens"]} tokens of others. In each budget for the weights the plan that is chosen, and every
uniform format that fits.

{table(columns, lines)}

The sum of the measured parts by what the whole loses: {ratios}.

Machine: {machine(arguments.threads, "torch", "scipy")} tightfit at {commit()}.
Command: `{command()}`, {time.monotonic() - began:.0f} s.
"""
    print(json.dumps([asdict(each) for each in results], indent=1) if arguments.json else written)
    if arguments.out:
        arguments.out.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
