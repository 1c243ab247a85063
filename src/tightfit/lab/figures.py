"""The lab's figures for the catalog: what each technique does to the embedded model, with its defaults.

``figures.json`` is made from folders of results, in which ``weights=all`` and ``kv=all`` are among the configurations:

    python -m tightfit.lab.figures FOLDER... [--out FILE]

Tests measure a sample of it anew for each technique, so it cannot go stale. Reading it imports nothing heavy.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.catalog import Technique, all_techniques, parse_one
from tightfit.errors import TightfitError, UsageError

if TYPE_CHECKING:
    from tightfit.lab.experiment import Experiment
    from tightfit.lab.report import Report, Row
    from tightfit.lab.results import Results

FILE = Path(__file__).with_name("figures.json")
VERSION = 1
LEAST_PROMPT = 640  # tokens: methods that let go of some keep 512 by default
NONE = "none"  # the cache that keeps everything as it is
SEAMS = ("weights", "kv")  # the embedded model has no experts


@cache
def figures() -> dict[str, Any]:
    """What the package's file holds: ``techniques`` and reasons why some are ``missing``, by seam and name; the
    ``spot`` that tests measure again; ``model``, ``fingerprint``, ``context``, ``seed``, ``machine``, ``versions`` and
    ``command``."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def of_technique(entry: Technique) -> dict[str, Any] | None:
    """The figures of one technique, None where there are none. Numbers have a ``value``, and ``low`` and ``high`` of a
    95% interval or null."""
    found: dict[str, Any] | None = figures()["techniques"].get(entry.seam, {}).get(entry.name)
    return found


def why_missing(entry: Technique) -> str:
    """Why there are no figures of a technique; "" where there are."""
    if entry.seam not in SEAMS:
        return f"the embedded model has no {entry.seam}"
    reason: str = figures()["missing"][entry.seam].get(entry.name, "")
    return reason


def make(folders: Sequence[Path]) -> dict[str, Any]:
    """What ``figures.json`` is to hold, from the results in ``folders``. Raises UsageError for a folder without
    results, several that were not measured alike, and a technique that none of them has."""
    from tightfit.lab.report import summarise
    from tightfit.lab.results import Results

    found = [Results.open(folder) for folder in folders]
    first = found[0].experiment
    for other in found[1:]:
        for name in ("fingerprint", "context", "seed", "tasks", "text"):
            if getattr(other.experiment, name) != getattr(first, name):
                raise UsageError(f"{other.folder} has another {name} than {found[0].folder}", "Measure them alike.")
    spot = spot_sample(first)
    made = [_of_folder(results, summarise(results), spot) for results in found]
    techniques = {seam: {name: each for part in made for name, each in part[seam].items()} for seam in SEAMS}
    refused = {key: each for results in found for key, each in results.refused.items()}
    missing: dict[str, dict[str, str]] = {seam: {} for seam in SEAMS}
    for entry in all_techniques():
        if entry.seam not in SEAMS or entry.name in techniques[entry.seam]:
            continue
        key = f"{entry.seam}={entry.name}"
        if key not in refused:
            raise UsageError(f"{key} was not measured", f"Run the lab to its end, with --vary {entry.seam}=all.")
        missing[entry.seam][entry.name] = f"{refused[key].error}. {refused[key].hint}"
    return {
        "version": VERSION,
        **{name: getattr(first, name) for name in ("model", "fingerprint", "context", "seed", "tasks", "machine")},
        "versions": first.versions,
        "command": "; ".join(dict.fromkeys(_without_folder(results.experiment.command) for results in found)),
        "spot": spot,
        "techniques": techniques,
        "missing": missing,
    }


def _without_folder(command: str) -> str:
    parts = shlex.split(command)
    at = next((i for i, part in enumerate(parts) if part in ("--out", "-o")), len(parts))
    return shlex.join([*parts[:at], *parts[at + 2 :]])


def spot_sample(experiment: Experiment) -> dict[str, Any]:
    """The sample that tests measure again, with its tokens: the first of the divergence task's shortest prompts that
    are long enough for every method to do something. Raises UsageError where there is none, or the texts that samples
    were made of are no longer here."""
    from tightfit import zoo
    from tightfit.checkpoints.checkpoint import open_checkpoint
    from tightfit.lab.material import Material

    spec = _task(experiment, "divergence")
    folder = zoo.path(experiment.model)
    with open_checkpoint(str(folder)) as checkpoint:
        material = Material.read(checkpoint.tokenizer(), folder)
    if [asdict(source) for source in material.sources] != experiment.text:
        raise UsageError("the texts that samples were made of are not here", "Measure again, without --text.")
    samples = parse_one("tasks", spec).samples(material, experiment.context, experiment.seed)
    long = [sample for sample in samples if len(sample.prompt) >= LEAST_PROMPT]
    if not long:
        raise UsageError(f"{spec} has no prompt of {LEAST_PROMPT} tokens", "Measure with longer ones.")
    sample = min(long, key=lambda sample: len(sample.prompt))  # of equal ones the first
    return {"task": spec, "sample": sample.key, "prompt": sample.prompt, "following": sample.following}


def _of_folder(results: Results, report: Report, spot: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The figures of the techniques that were measured, by seam and name."""
    found: dict[str, dict[str, Any]] = {seam: {} for seam in SEAMS}
    for entry in all_techniques():
        row = report.by_key.get(f"{entry.seam}={entry.name}")
        if entry.seam not in SEAMS or row is None or not row.finished:
            continue
        sample = results.samples[row.key, spot["task"], spot["sample"]]
        metrics = parse_one("tasks", spot["task"]).metrics
        found[entry.seam][entry.name] = {
            "configuration": row.key,
            **(_of_weights(report, row) if entry.seam == "weights" else _of_cache(results, report, row)),
            "spot": {metric.name: sample.values[metric.name] for metric in metrics},
        }
    return found


def _of_weights(report: Report, row: Row) -> dict[str, Any]:
    bits = 8 * row.indicators["weights_bytes"] / row.indicators["parameters"]
    return {"bits_per_weight": _exactly(bits), **_quality(report, row)}


def _of_cache(results: Results, report: Report, row: Row) -> dict[str, Any]:
    whole = report.by_key.get(f"kv={NONE}")
    if whole is None:
        raise UsageError(f"kv={NONE} was not measured", f'Run the lab with --vary "kv={NONE}; kv=all".')
    share = row.indicators["kv_bytes"] / whole.indicators["kv_bytes"]
    return {"cache_share": _exactly(share), **_quality(report, row), "speed_ratio": _speed(results, report, row, whole)}


def _quality(report: Report, row: Row) -> dict[str, Any]:
    kl = row.values[f"{_task(report.experiment, 'divergence')}.kl"]
    lookups = row.values[f"{_task(report.experiment, 'lookup')}.correct"]
    return {"kl": asdict(kl), "lookups": asdict(lookups)}


def _speed(results: Results, report: Report, row: Row, whole: Row) -> dict[str, Any]:
    """How many times as many tokens come in a second as from the whole cache, after the longest prompt measured."""
    from tightfit.lab.statistics import Array, estimate, median

    def ratio(rows: Array) -> Array:
        return median(rows) / median(rows[..., 1:])

    task = _task(report.experiment, "latency")
    return asdict(estimate([*zip(*(_times(results, key, task) for key in (whole.key, row.key)), strict=True)], ratio))


def _times(results: Results, key: str, task: str) -> list[float]:
    """Seconds for each new token, of all repetitions after the longest prompt."""
    samples = (each for (configuration, of, _), each in results.samples.items() if (configuration, of) == (key, task))
    longest = max(samples, key=lambda sample: sample.group["tokens"])
    return [token for _, token in longest.values["repetitions"]]


def _exactly(value: float) -> dict[str, Any]:
    """A number that was counted, as an estimate is written."""
    return {"value": value, "low": None, "high": None, "samples": 1}


def _task(experiment: Experiment, name: str) -> str:
    """The spec string of the task ``name``. Raises UsageError where it was not measured."""
    spec = next((spec for spec in experiment.tasks if spec.partition("(")[0] == name), None)
    if spec is None:
        raise UsageError(f"the task {name} was not measured", "Add it to --tasks.")
    return spec


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=f"{__doc__}".split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="results of `tightfit lab run`")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="default: the package's own")
    options = parser.parse_args(arguments)
    try:
        made = make(options.folders)
    except TightfitError as error:
        raise SystemExit(f"error: {error}") from error
    options.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
