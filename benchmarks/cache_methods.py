"""All methods of the cache at equal bytes, on the embedded model.

    python benchmarks/cache_methods.py run FOLDER [--shares 50 25] [--methods h2o snapkv] [--speed | --layered]
    python benchmarks/cache_methods.py fits FITS.json
    python benchmarks/cache_methods.py table FOLDER [--speed FOLDER] [--layered FOLDER] [--fits FITS.json]
                                               [--out FILE.md | --json]

Each method has one setting by which it grows: the largest is taken with which the ``kv`` account, as the cache itself
allocates it, is no larger than a share of a cache that keeps everything, for a context of 4096 tokens. What has no such
setting stands where it fits. ``run`` first finds what methods must know of the model (`tightfit fit`, on half of the
held-out texts), then measures with the lab: look-ups in dictionaries and of hidden numbers, and the KL divergence of
text after long prompts, which begins in the other half. With ``--speed`` it measures seconds and peaks instead: on a
quiet machine. With ``--layered`` prompts are computed layer by layer, so that methods judge them as a whole. A run that
was ended goes on. ``fits`` measures how long `tightfit fit` takes with each method's own settings, in a new cache
folder. ``table`` writes the page, or with ``--json`` prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import command, commit, held_out, machine, table

from tightfit import zoo
from tightfit.catalog import all_techniques
from tightfit.checkpoints.checkpoint import open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.errors import CheckpointError, UsageError
from tightfit.kv.compose import compose, known_of
from tightfit.kv.fitted import NOTHING, Fitted
from tightfit.kv.make import kv_nbytes
from tightfit.lab.report import Report, Row, summarise
from tightfit.lab.results import Results
from tightfit.lab.statistics import Estimate
from tightfit.model.decoder import cache_layouts
from tightfit.model.families import model_spec

MODEL, OWNERS, CONTEXT, CHUNK, MEMORY = "nano", list(range(8)), 4096, 128, "1GiB"
BASELINE = "int8"
SHARES = (50.0, 25.0, 12.5, 6.0)
TASKS = "lookup(questions=16,tokens=2000),needle(questions=2,tokens=2000),divergence(texts=8,tokens=95%)"
SPEED = "latency(repetitions=3,tokens=90%),memory"

# Of each method the spec string with its growing setting, and between which values; or what it is if nothing grows.
TOKENS = (8, CONTEXT)
GROWING: dict[str, tuple[str, tuple[int, int], float]] = {
    name: (spec, TOKENS, 1.0)
    for name, spec in {
        "window": "window(keep={})",
        "h2o": "h2o(keep={})",
        "scissorhands": "scissorhands(keep={})",
        "tova": "tova(keep={})",
        "corm": "corm(keep={})",
        "morphkv": "morphkv(keep={})",
        "scope": "scope(keep={},output=64,recent=32)",
        "snapkv": "snapkv(keep={})",
        "snapkv, pyramid": "snapkv(keep={},budget=pyramid)",
        "snapkv, adakv": "snapkv(keep={},budget=adakv)",
        "snapkv, dynamickv": "snapkv(keep={},budget=dynamickv)",
        "locret": "locret(keep={})",
        "razor": "razor(recent={})",
        "duo": "duo(recent={})",
        "lighttransfer": "lighttransfer(recent={})",
        "d2o": "d2o(keep={})",
        "kvmerger": "kvmerger(keep={})",
        "elastic": "elastic(keep={})",
        "ems": "ems(keep={})",
        "less": "less+h2o(keep={})",
        "lococo": "lococo(keep={})",
        "mikv": "mikv(keep={})",
        "hgca": "hgca(keep={})",
        "razor+int4": "razor(recent={})+int4",
        "duo+int4": "duo(recent={})+int4",
        "duo, an eighth": "duo(retrieval=0.125,recent={})",
        "duo, an eighth+int4": "duo(retrieval=0.125,recent={})+int4",
        "lighttransfer+int4": "lighttransfer(recent={})+int4",
        "snapkv+int4": "snapkv(keep={})+int4",
        "h2o+int4": "h2o(keep={})+int4",
        "host": "host(resident={})",
        "quest+host": "quest+host(resident={})",
        "recycled+host": "recycled+host(resident={})",
        "clusterkv+host": "clusterkv+host(resident={})",
        "squeezed+host": "squeezed+host(resident={})",
        "alisa+host": "alisa+host(resident={})",
        "a2ats+host": "a2ats+host(resident={})",
        "headinfer": "headinfer(resident={})",
        "specache": "specache(resident={})",
        "tailor": "tailor(resident={})",
    }.items()
} | {
    "zipcache": ("zipcache(keep={})", (1, 100), 0.01),
    "matryoshka": ("matryoshka(share={})", (1, 99), 0.01),
}
# Those that judge a prompt by what its queries look at, of GROWING.
JUDGING = ("h2o", "scissorhands", "tova", "corm", "morphkv", "scope", "snapkv", "d2o", "kvmerger", "elastic", "ems")
JUDGING += ("less", "mikv", "hgca", "zipcache")
FIXED = (
    "int8",
    "int4",
    "int4(of=keys)+int2(of=values)",
    "int2",
    "gear(bits=4)",
    "gear",
    "cq(coupled=2,bits=8)",
    "cq(coupled=4,bits=8)",
    "cq(coupled=8,bits=8)",
    "aqua",
    "think",
    "think+int4",
    "cskv(keys=0.5,values=0.5)",
    "cskv(keys=0.4,values=0.4)",
    "cskv",
    "cskv(keys=0.1,values=0.1)",
    "gqa",
    "gqa+int4",
    "kvsharer",
    "kvsharer(share=0.5)",
    "pod(keep=128)",
    "pod(keep=128)+int4",
)


class Sizes:
    """The bytes that caches take."""

    def __init__(self) -> None:
        checkpoint = open_checkpoint(str(zoo.path(MODEL)))
        spec = model_spec(Config(checkpoint.config, checkpoint.name), checkpoint.tensors)
        self.layouts = cache_layouts(spec, CONTEXT, CHUNK)
        self.name, self.fingerprint = checkpoint.name, checkpoint.fingerprint
        checkpoint.close()
        self.whole = self.nbytes("none")

    def nbytes(self, kv: str) -> int:
        known = known_of(kv, self.name, self.fingerprint, OWNERS) if compose(kv).fitted else NOTHING
        return kv_nbytes(kv, self.layouts, CONTEXT, 1, "bfloat16", known)

    def fitting(self, share: float, names: list[str]) -> dict[str, str]:
        """Of each method the largest that takes no more than ``share`` percent of everything; a fixed one only if it
        takes more than half of that, so that it is compared where it belongs."""
        most, found = int(self.whole * share / 100), {}
        for name, (spec, (low, high), unit) in GROWING.items():
            if names and name.partition("+")[0].partition(",")[0] not in names:
                continue

            def fits(number: int, spec: str = spec, unit: float = unit) -> bool:
                return self.fits(spec.format(f"{number * unit:g}"), most)

            best = largest(fits, low, high)
            if best is not None and (best < CONTEXT or unit < 1):  # otherwise nothing is left out
                found[name] = spec.format(f"{best * unit:g}")
        for spec in FIXED:
            if names and spec.partition("(")[0].partition("+")[0] not in names:
                continue
            if self.fits(spec, most) and not self.fits(spec, most // 2):
                found[spec] = spec
        return found

    def fits(self, kv: str, most: int) -> bool:
        try:
            return self.nbytes(kv) <= most
        except UsageError:
            return False


def largest(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest number that fits, where all below it do that a method can be given at all."""
    candidates = [number for number in (low, 16, 32, 64, 80, 100, 132, 140, 160, 200, 256) if low <= number <= high]
    first = next((number for number in candidates if fits(number)), None)
    if first is None:
        return None
    while first < high:
        middle = (first + high + 1) // 2
        first, high = (middle, high) if fits(middle) else (first, middle - 1)
    return first


@contextmanager
def fitting_text() -> Iterator[str]:
    """The half of the held-out texts that methods are fitted on, in a file."""
    texts, _ = held_out(zoo.path(MODEL))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(texts[: len(texts) // 2]))
        file.flush()
        yield file.name


def fit_arguments(method: str, text: str) -> list[str]:
    arguments = ["fit", MODEL, "--kv", method, "--text", text, "--memory", "4GiB"]
    return [sys.executable, "-m", "tightfit", *arguments]


def fit_all(specs: list[str]) -> None:
    """Finds what methods must know, where it was not found yet."""
    with fitting_text() as text, open_checkpoint(str(zoo.path(MODEL))) as checkpoint:
        for method in {method.fitted_by() for spec in specs for method in compose(spec).fitted}:
            try:
                known_of(method, checkpoint.name, checkpoint.fingerprint, OWNERS)
            except CheckpointError:
                subprocess.run(fit_arguments(method, text), check=True)


def time_fits(out: Path) -> None:
    """Fits each method with its own settings."""
    names = [entry.name for entry in all_techniques() if entry.seam == "kv" and issubclass(entry.cls, Fitted)]
    found = {}
    with fitting_text() as text, tempfile.TemporaryDirectory() as folder:
        for name in sorted(names):
            start = time.monotonic()
            environment = os.environ | {"XDG_CACHE_HOME": folder}
            printed = subprocess.run([*fit_arguments(name, text), "--json"], env=environment, capture_output=True)
            printed.check_returncode()
            seconds, file = time.monotonic() - start, Path(json.loads(printed.stdout)["file"])
            found[name] = {"seconds": seconds, "bytes": file.stat().st_size}
            print(f"{name}: {seconds:.1f} s", flush=True)
    out.write_text(json.dumps(found, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("folder", type=Path)
    run.add_argument(
        "--shares", type=float, nargs="+", metavar="PERCENT", help="default: what int8 takes, 50, 25, 12.5 and 6"
    )
    run.add_argument("--methods", nargs="+", default=[], metavar="NAME")
    how = run.add_mutually_exclusive_group()
    how.add_argument("--speed", action="store_true")
    how.add_argument("--layered", action="store_true")
    run.add_argument("--show", action="store_true", help="only say what would be measured")
    fits = commands.add_parser("fits")
    fits.add_argument("out", type=Path, metavar="FITS.json")
    shown = commands.add_parser("table")
    shown.add_argument("folder", type=Path)
    shown.add_argument("--speed", type=Path, metavar="FOLDER")
    shown.add_argument("--layered", type=Path, metavar="FOLDER")
    shown.add_argument("--fits", type=Path, metavar="FITS.json")
    shown.add_argument("--out", type=Path)
    shown.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.command == "table":
        show(options)
        return
    if options.command == "fits":
        time_fits(options.out)
        return
    sizes = Sizes()
    methods = options.methods or (list(JUDGING) if options.layered else [])
    fit_all([spec.format("0.5") if unit < 1 else spec.format(512) for spec, _, unit in GROWING.values()] + list(FIXED))
    shares = options.shares or [100 * sizes.nbytes(BASELINE) / sizes.whole, *SHARES]
    found = {share: sizes.fitting(share, methods) for share in shares}
    chosen = [spec for of_share in found.values() for spec in of_share.values()]
    specs = list(dict.fromkeys(["none", BASELINE, *chosen]))
    if options.show:
        for share, of_share in found.items():
            rows = [[name, spec, f"{100 * sizes.nbytes(spec) / sizes.whole:.1f}"] for name, spec in of_share.items()]
            print(f"\n{share:.1f}%\n" + table(["method", "with", "% of everything"], rows))
        print(f"{len(specs)} configurations")
        return
    tasks = SPEED if options.speed else TASKS
    schedule = ["--prefill", "layered"] if options.layered else []
    arguments = ["lab", "run", MODEL, "--memory", MEMORY, "--context", str(CONTEXT), "--chunk", str(CHUNK), *schedule]
    arguments += ["--tasks", tasks, "--vary", f"kv=[{','.join(specs)}]", "--out", str(options.folder)]
    print(shlex.join(["tightfit", *arguments]))
    raise SystemExit(subprocess.run([sys.executable, "-m", "tightfit", *arguments]).returncode)


def show(options: argparse.Namespace) -> None:
    """Writes the page of what was measured."""
    report, speed, layered = (
        None if folder is None else summarise(Results.open(folder))
        for folder in (options.folder, options.speed, options.layered)
    )
    assert report is not None
    whole, baseline = report.by_key["kv=none"], report.by_key[f"kv={BASELINE}"]
    shares = [100 * baseline.indicators["kv_bytes"] / whole.indicators["kv_bytes"], *SHARES]
    rows = finished(report)
    found: dict[float, list[Row]] = {share: [] for share in shares}
    for row in rows:
        share = 100 * row.indicators["kv_bytes"] / whole.indicators["kv_bytes"]
        fits = [each for each in shares if share <= each * 1.0001]
        if row is not whole and fits:
            found[min(fits)].append(row)
    if options.json:
        named = {f"{share:g}": [as_json(report, speed, row) for row in of] for share, of in found.items()}
        if layered is not None:
            named["layered"] = [as_json(layered, None, row) for row in finished(layered)]
        print(json.dumps(named))
        return
    parts = [
        "# Methods of the cache at equal bytes",
        f"Made by `{command()}` at {commit()}, with chunks of {CHUNK} tokens. "
        f"{machine(int(report.experiment.machine['cores']), 'torch')}",
        ABOUT,
    ]
    if speed is not None:
        none = speed.by_key["kv=none"]
        token, first = (seconds(speed, none, metric) for metric in (".token", ".first_token"))
        parts.append(f"`none` gives {1 / token:.0f} new tokens in a second, the first after {first:.2f} s.")
    for share, of_share in found.items():
        of_share.sort(key=lambda row: kl(report, row).value)
        title = f"{BASELINE}'s {share:.0f}%" if share == shares[0] else f"{share:g}%"
        lines = [cells(report, speed, row) for row in (whole, *of_share)]
        parts += [f"## At most {title} of {whole.indicators['kv_bytes'] / 2**20:.0f} MiB", table(COLUMNS, lines)]
    if layered is not None:
        judged = sorted(finished(layered), key=lambda row: kl(layered, row).value)
        parts += [
            "## Where prompts are judged as a whole (`--prefill layered`)",
            table(COLUMNS[:6], [cells(layered, None, row)[:6] for row in judged]),
        ]
    if options.fits is not None:
        rows_of_fits = [
            [f"`{name}`", f"{each['seconds']:.0f}", f"{each['bytes'] / 1024:.0f}"]
            for name, each in json.loads(options.fits.read_text()).items()
        ]
        parts += ["## What `tightfit fit` takes", table(["method", "seconds", "KiB kept"], rows_of_fits)]
    page = "\n\n".join(parts) + "\n"
    if options.out is None:
        print(page)
    else:
        options.out.write_text(page, encoding="utf-8")


def finished(report: Report) -> list[Row]:
    """What was measured beside the exact model."""
    return [row for row in report.rows if row.finished and "kv" in row.vary]


ABOUT = (
    "Right answers, of 16 questions on dictionaries of 2000 tokens and of 20 on numbers hidden in as many, and KL "
    "divergence in nats from the exact cache on the 64 tokens behind 8 held-out texts of 95% of the context, with 95% "
    "intervals. What a token reads is counted after a prompt of as many tokens, from memory or a file. Speed is after "
    "a prompt of 90% of the context, the median of three, divided by that of `none`. The peak is what was resident of "
    "the accounts of the cache and of scratch memory while a prompt that fills the context was computed."
)
COLUMNS = (
    "methods",
    "kv MiB",
    "read by a token, MiB",
    "dictionary",
    "hidden numbers",
    "KL divergence",
    "new tokens, times as many",
    "first token, times as long",
    "cache and scratch at their peak, MiB",
)


def kl(report: Report, row: Row) -> Estimate:
    return next(value for name, value in row.values.items() if name.startswith("divergence") and name.endswith(".kl"))


def answers(row: Row, task: str) -> Estimate:
    return next(value for name, value in row.values.items() if name.startswith(task) and name.endswith(".correct"))


def seconds(report: Report, row: Row, metric: str) -> float:
    """The median of a time of the latency task."""
    values = row.values.items()
    return next(each.value for name, each in values if name.startswith("latency") and name.endswith(metric))


def interval(of: Estimate, digits: int) -> str:
    if of.low is None or of.high is None:
        return f"{of.value:.{digits}f}"
    return f"{of.value:.{digits}f} ({of.low:.{digits}f} to {of.high:.{digits}f})"


def cells(report: Report, speed: Report | None, row: Row) -> list[str]:
    own = [
        f"`{row.vary['kv']}`",
        f"{row.indicators['kv_bytes'] / 2**20:.2f}",
        f"{(row.indicators['read_bytes_per_token'] - row.indicators['weights_bytes']) / 2**20:.1f}",
        interval(answers(row, "lookup"), 2),
        interval(answers(row, "needle"), 2),
        interval(kl(report, row), 5),
    ]
    timed = None if speed is None else speed.by_key.get(row.key)
    if speed is None or timed is None or not timed.finished:
        return [*own, "", "", ""]
    none = speed.by_key["kv=none"]
    return [
        *own,
        f"{seconds(speed, none, '.token') / seconds(speed, timed, '.token'):.2f}",
        f"{seconds(speed, timed, '.first_token') / seconds(speed, none, '.first_token'):.2f}",
        f"{sum(timed.values[f'memory.{account}'].value for account in ('kv', 'workspace')) / 2**20:.2f}",
    ]


def as_json(report: Report, speed: Report | None, row: Row) -> dict[str, str]:
    return dict(zip(COLUMNS, cells(report, speed, row), strict=True))


if __name__ == "__main__":
    main()
