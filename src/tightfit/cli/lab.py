"""``tightfit lab``: techniques side by side, on one model and the same samples."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tightfit.cli import report
from tightfit.cli.options import (
    Activations,
    Chunk,
    Context,
    Debug,
    Experts,
    Json,
    Kv,
    Memory,
    Model,
    Prefill,
    Threads,
    Weights,
)
from tightfit.cli.output import print_json, say
from tightfit.cli.progress import foreseen
from tightfit.errors import TightfitError, UsageError

if TYPE_CHECKING:
    from tightfit.lab.results import End, Refused, Results
    from tightfit.lab.runner import State

app = typer.Typer(help="Measure techniques side by side.", rich_markup_mode=None)

NAMED = "nano"
Named = Annotated[str | None, typer.Option("--model", hidden=True)]
Vary = Annotated[
    list[str] | None,
    typer.Option(
        "--vary",
        metavar="NAME=VALUES",
        help='What is compared: "kv=[none,int4]", "weights=all", or alternatives, "weights=all; kv=all". Repeat it for '
        "all combinations.",
    ),
]
Tasks = Annotated[str, typer.Option("--tasks", metavar="TASKS", help="What is measured: perplexity,lookup, ...")]
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where results go. A run that was ended goes on there.")
]
Exact = Annotated[
    str | None,
    typer.Option(
        "--exact",
        metavar="NAME=VALUE,...",
        help="What the others are compared with, where that does not fit: weights=bf16.",
        show_default="weights=f32,activations=float32,kv=none",
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Which samples are drawn.")]
Text = Annotated[
    list[Path] | None,
    typer.Option("--text", metavar="FILE", help="A text that samples are made of. Repeat it for several."),
]


@app.callback()
def lab() -> None:
    """Measure techniques side by side."""


@app.command("run")
def run(
    out: Out,
    model: Model = NAMED,
    named: Named = None,
    vary: Vary = None,
    tasks: Tasks = "divergence,lookup,latency",
    exact: Exact = None,
    seed: Seed = 0,
    text: Text = None,
    memory: Memory = None,
    context: Context = None,
    weights: Weights = None,
    chunk: Chunk = None,
    activations: Activations = None,
    experts: Experts = None,
    kv: Kv = None,
    prefill: Prefill = None,
    threads: Threads = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure configurations of a model on the same samples.

    Each runs in a process of its own; the exact model comes first. The same command goes on where it was ended. Exit
    status 1 if a process crashed.
    """
    from tightfit.lab.results import begin
    from tightfit.lab.runner import prepare
    from tightfit.lab.runner import run as measure

    if named is not None and model != NAMED:
        raise UsageError(f"two models are named: {model} and {named}", "Leave --model out.")
    model = named or model
    common = {
        "memory": memory,
        "context": context,
        "weights": weights,
        "chunk": chunk,
        "activations": activations,
        "experts": experts,
        "kv": kv,
        "prefill": prefill,
        "threads": threads,
    }
    command = shlex.join(["tightfit", *sys.argv[1:]])
    experiment, samples = prepare(model, vary or [], tasks, common, exact, seed, text or [], command)
    results = begin(out, experiment)
    before = len(results.samples)
    try:
        with foreseen("lab") as progress:
            measure(results, samples, model, _Watcher(progress))
    except KeyboardInterrupt:
        line = f"{len(results.samples)} samples are kept in {out}: the same command goes on"
        say(f"\n{line}" if sys.stderr.isatty() else line)
        raise
    if json:
        measured = len(results.samples) - before
        print_json({"folder": str(out), "measured": measured, "configurations": _described(results)})
    else:
        _show(results)
    crashed = [refused.configuration for refused in results.refused.values() if refused.crashed]
    if crashed:
        say(f"error: {len(crashed)} of the processes crashed: {'; '.join(crashed)}\nThe same command tries them again.")
        raise typer.Exit(TightfitError.exit_status)


@dataclass(frozen=True)
class _Watcher:
    """Shows how far a run is: a bar on a terminal, elsewhere a line for each configuration."""

    progress: Callable[[str, int, int, float | None], None]

    def at(self, state: State) -> None:
        self.progress(state.configuration, state.done, state.total, state.left)

    def ended(self, configuration: str, outcome: End | Refused) -> None:
        if not sys.stderr.isatty():
            say(f"{configuration}: {_outcome(outcome)}")


def _outcome(outcome: End | Refused) -> str:
    from tightfit.budget.units import format_bytes
    from tightfit.lab.results import End

    if isinstance(outcome, End):
        peak, budget = format_bytes(outcome.peak_rss_bytes), format_bytes(outcome.budget_bytes)
        return f"peak {peak} of {budget}, {outcome.seconds:.1f} s"
    return f"{'crashed' if outcome.crashed else 'refused'}: {outcome.error}"


def _described(results: Results) -> list[dict[str, Any]]:
    """Of each configuration ``key``, ``state`` and ``samples``, and what its process took, or why it has none."""
    described = []
    counts = Counter(configuration for configuration, _, _ in results.samples)
    for configuration in results.experiment.configurations:
        key = configuration.key
        entry: dict[str, Any] = {"key": key, "state": "missing", "samples": counts[key]}
        if key in results.ends:
            end = results.ends[key]
            entry |= {"state": "done", "peak_rss_bytes": end.peak_rss_bytes, "budget_bytes": end.budget_bytes}
            entry |= {"indicators": end.indicators, "seconds": end.seconds}
        elif key in results.refused:
            refused = results.refused[key]
            entry |= {"state": "crashed" if refused.crashed else "refused", "error": refused.error}
            entry |= {"hint": refused.hint, "smallest_bytes": refused.smallest_bytes}
        described.append(entry)
    return described


def _show(results: Results) -> None:
    from tightfit.budget.units import format_bytes
    from tightfit.cli.screen import show, table

    made = table("configuration", "samples", "peak", "weights", "kv", "")
    for entry in _described(results):
        sizes, state = ["", "", ""], entry["state"]
        if state == "done":
            weights, kv = (entry["indicators"][name] for name in ("weights_bytes", "kv_resident_bytes"))
            sizes = [format_bytes(size) for size in (entry["peak_rss_bytes"], weights, kv)]
        elif "error" in entry:
            state += f": {entry['error']}"
        made.add_row(entry["key"], str(entry["samples"]), *sizes, state)
    show(made)


app.command("report")(report.report)
