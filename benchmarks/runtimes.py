"""Decoding, prefill, batches, long prompts and start-up beside other runtimes: speed, memory, shares of the limits.

    python benchmarks/runtimes.py --peers PEERS.json [--model FOLDER] [--only decode levels ...] [--out FILE.md]

Every run is a process of its own, the systems take turns, and tables give medians. Sections:

- ``decode``: one prompt of 512 tokens, 128 new ones
- ``levels``: the same with the kernels for lesser processors (``TIGHTFIT_CPU``), 32 new ones
- ``batch``: 16 prompts of 256 tokens at once, 64 new ones each
- ``long``: one prompt of 8192 tokens, 32 new ones
- ``start``: from the start of the process to the first token after a prompt of 512 tokens, with the files in the page
  cache and not

PEERS.json is a list of ``{"name", "runtime", "python", "model", "arguments", "sections"}``: ``python`` is the
interpreter that has the runtime, ``runtime`` the script in benchmarks/peers that measures it (openvino, llamacpp,
onnxruntime, transformers), ``model`` what that script takes, and ``arguments`` are more of its arguments. Paths are
relative to the file. benchmarks/peers/README.md says how to make all of that. Without --peers only tightfit is
measured.

tightfit runs each of --weights from a folder that `tightfit compress` wrote (in --folders, where it is kept, or for the
time of the run), with the budget that `tightfit plan` says it needs. Without --model a random llama of 1.05 billion
parameters is written to a temporary folder; --preset 3b is one of 3 billion.

The limits are those of the machine: decoding reads every weight but the embeddings for each token, so memory bandwidth
bounds it (keys and values are left out of what is read); prefill is bounded by torch's own bfloat16 matrix products.
Peak memory is what the operating system saw of the process, mapped files included. A run during which the machine did
something else is repeated (--tries), and marked with * if that did not help.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Machine, checked, command, commit, in_page_cache, machine, matmul_rate, table
from tests import random_model
from tests.measure import run_measured

from tightfit.catalog import TECHNIQUES, parse_one

PEERS = Path(__file__).resolve().parent / "peers"
MiB = 2**20
BUDGET_STEP = 10 * MiB
NOISE = 4 * MiB  # by how much what `tightfit plan` measures of itself differs from another process
UNLIMITED = "1TiB"
TIMEOUT = 900
SHOWN_DISTURBANCES = 5
# What torch's libraries may use, where tightfit's kernels are held back.
HELD_BACK = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@dataclass(frozen=True)
class Section:
    """``new`` tokens follow the first one. ``repeat`` 0 measures the warm-up alone; ``turns`` is the most there are."""

    title: str
    prompt: int
    new: int
    batch: int = 1
    warm: int = 16
    repeat: int = 1
    turns: int = 100

    @property
    def context(self) -> int:
        return max(self.prompt + self.new + 1, self.warm + 2)


SECTIONS = {
    "decode": Section("One prompt of 512 tokens, 128 new ones", 512, 128, warm=512),
    "levels": Section("Kernels for lesser processors: 512 tokens, 32 new ones", 512, 32),
    "batch": Section("16 prompts of 256 tokens, 64 new ones each", 256, 63, batch=16, turns=2),
    "long": Section("One prompt of 8192 tokens, 32 new ones", 8192, 32, turns=1),
    "start": Section("From the start of the process to the first token after 512", 512, 0, warm=512, repeat=0),
}


@dataclass(frozen=True)
class System:
    """``model`` is what it reads: a file or a folder, which ``cached`` says to have in the page cache or to have not.
    ``bytes_per_token`` are the weights read for a token."""

    name: str
    command: tuple[str, ...]
    model: Path
    bytes_per_token: int
    versions: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    budget: int | None = None
    cached: bool | None = None


@dataclass(frozen=True)
class Run:
    """Times in seconds; ``first_token`` from the start of the process, ``prefill`` and ``total`` of the repetition."""

    quiet: bool
    peak: int
    first_token: float | None
    prefill: float | None = None
    total: float | None = None


def tightfit_system(
    name: str,
    folder: Path,
    section: Section,
    threads: int,
    weights: str | None = None,
    env: dict[str, str] | None = None,
    kv: str | None = None,
) -> System:
    """tightfit with the smallest budget in which it is as fast as it can be."""
    options = ([] if weights is None else ["--weights", weights]) + ([] if kv is None else ["--kv", kv])
    plan = _plan(folder, options, section, threads)
    needed = sum(plan["accounts"].values()) + NOISE
    budget = -(-needed // BUDGET_STEP) * BUDGET_STEP
    # The embeddings are half of what lies outside of the layers: the other half is the head.
    tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings")
    embeddings = 0 if tied else plan["outer"]["nbytes"] // 2
    script = str(PEERS / "run_tightfit.py")
    return System(
        name=f"tightfit {name}",
        command=(sys.executable, script, str(folder), "--memory", str(budget), *options),
        model=folder,
        bytes_per_token=plan["accounts"]["weights"] - embeddings,
        env=env or {},
        budget=budget,
    )


def _plan(folder: Path, options: list[str], section: Section, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tightfit", "plan", folder, *options, "--memory", UNLIMITED, "--json"]
    command += ["--context", section.context, "--batch", section.batch, "--threads", threads]
    plan: dict[str, Any] = json.loads(checked(run_measured([str(part) for part in command])).stdout)["plan"]
    return plan


def peer_systems(path: Path) -> dict[str, list[System]]:
    """The peers of each section."""
    found: dict[str, list[System]] = {name: [] for name in SECTIONS}
    for peer in json.loads(path.read_text()):
        # Not resolved: a virtual environment's python is a link to another one.
        python, model = str(path.parent / peer["python"]), path.parent / peer["model"]
        command = (python, str(PEERS / f"run_{peer['runtime']}.py"), str(model), *peer.get("arguments", ()))
        about = json.loads(checked(run_measured([*command, "--describe"], timeout=TIMEOUT)).stdout.splitlines()[-1])
        system = System(peer["name"], command, model, about["bytes_per_token"], about["versions"])
        for section in peer.get("sections", ["decode"]):
            found[section].append(system)
    return found


class Compressed:
    """Folders that `tightfit compress` made of one model, by format; ``seconds`` and ``peak`` of those made now."""

    def __init__(self, model: Path, folders: Path) -> None:
        self.model, self.folders = model, folders
        self.made: dict[str, dict[str, Any]] = {}

    def folder(self, weights: str) -> Path:
        out = self.folders / weights
        if not out.exists():
            command = [sys.executable, "-m", "tightfit", "compress", self.model, "--weights", weights]
            done = checked(run_measured([str(part) for part in [*command, "--out", out, "--json"]], timeout=TIMEOUT))
            self.made[weights] = json.loads(done.stdout)
        return out


def tightfit_systems(
    name: str, model: Path, compressed: Compressed, formats: list[str], levels: list[str], kvs: list[str], threads: int
) -> Iterator[System]:
    """tightfit's part in section ``name``: the first of ``formats`` stands for all where formats are not compared.
    Methods of the cache (``kvs``) are compared where prompts are long."""
    section, first = SECTIONS[name], formats[0]

    def stored(weights: str, suffix: str = "", env: dict[str, str] | None = None, kv: str | None = None) -> System:
        if TECHNIQUES["weights", parse_one("weights", weights).name].exact:  # the checkpoint itself
            return tightfit_system(weights + suffix, model, section, threads, weights, env, kv)
        return tightfit_system(weights + suffix, compressed.folder(weights), section, threads, env=env, kv=kv)

    if name == "decode":
        yield from map(stored, formats)
    else:
        yield stored(first)
    if name == "long":
        for kv in kvs:
            yield stored(first, f", cache {kv}", kv=kv)
    if name == "levels":
        for level in levels:
            yield stored(first, f", TIGHTFIT_CPU={level}", {"TIGHTFIT_CPU": level, **HELD_BACK})
    if name == "start":
        yield tightfit_system(f"{first}, from the bfloat16 checkpoint", model, section, threads, first)


def run(system: System, section: Section, watched: Machine) -> Run:
    options = {
        "prompt": section.prompt,
        "new": section.new,
        "batch": section.batch,
        "warm": section.warm,
        "repeat": section.repeat,
        "threads": watched.threads,
    }
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]

    def prepare() -> None:
        if system.cached is not None:
            in_page_cache(system.model, system.cached)

    ended = watched.run([*system.command, *arguments], {**system.env, "HF_HUB_OFFLINE": "1"}, TIMEOUT, prepare)
    result = json.loads(ended.done.stdout.splitlines()[-1])
    at = result["first_token_at"]
    times = result["runs"][0] if result["runs"] else {"prefill_s": None, "total_s": None}
    return Run(
        quiet=ended.quiet,
        peak=ended.done.peak_bytes,
        first_token=None if at is None else at - ended.began,
        prefill=times["prefill_s"],
        total=times["total_s"],
    )


@dataclass(frozen=True)
class Row:
    """The runs of one system in one section; those on a quiet machine count, or all where there are none."""

    system: System
    section: Section
    runs: list[Run] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.system.name + ("" if all(run.quiet for run in self.counted) else " *")

    @property
    def counted(self) -> list[Run]:
        return [run for run in self.runs if run.quiet] or self.runs

    def of(self, value: Callable[[Run], float]) -> list[float]:
        return [value(run) for run in self.counted]

    @property
    def peak(self) -> float:
        return statistics.median(self.of(lambda run: run.peak))

    @property
    def first_token(self) -> list[float]:
        return [run.first_token for run in self.counted if run.first_token is not None]

    @property
    def prefill(self) -> list[float]:
        """Tokens per second."""
        return [self.section.prompt / run.prefill for run in self.counted if run.prefill]

    @property
    def decode(self) -> list[float]:
        """Tokens per second, after the first one."""
        return [self.section.new / (run.total - run.prefill) for run in self.counted if run.prefill and run.total]

    @property
    def generated(self) -> list[float]:
        """New tokens per second of the whole time, all sequences together."""
        return [self.section.batch * (self.section.new + 1) / run.total for run in self.counted if run.total]

    def asdict(self) -> dict[str, Any]:
        return {
            "system": self.system.name,
            "budget_bytes": self.system.budget,
            "bytes_per_token": self.system.bytes_per_token,
            "runs": [asdict(run) for run in self.runs],
        }


@dataclass(frozen=True)
class Limits:
    """Of the machine: bytes and operations per second. Of the model: ``inner`` weights of all layers' matrices."""

    bandwidth: float
    products: float
    inner: int
    attention: int  # operations for each pair of a token and one before it

    @staticmethod
    def of(model: Path, bandwidth: float, threads: int) -> Limits:
        config = json.loads((model / "config.json").read_text())
        hidden, ffn = config["hidden_size"], config["intermediate_size"]
        shapes = [shape for name, shape in random_model.shapes(config) if "layers" in name and len(shape) == 2]
        return Limits(
            bandwidth=bandwidth,
            products=matmul_rate(threads, 512, hidden, ffn),
            inner=sum(rows * cols for rows, cols in shapes),
            attention=4 * config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"],
        )

    def prefill(self, tokens: int) -> float:
        """Tokens per second of a prompt of ``tokens`` at torch's own rate; the head is for one token only."""
        return self.products / (2 * self.inner + self.attention * tokens / 2)


def median(values: list[float], digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f}" if values else ""


def spread(values: list[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}" if len(values) > 1 else ""


def share(values: list[float], limit: float) -> str:
    return f"{statistics.median(values) / limit:.0%}" if values else ""


def section_table(rows: list[Row], limits: Limits) -> str:
    section = rows[0].section
    lines = []
    columns = ["system", "runs", "budget MiB", "peak MiB"]
    if section.batch > 1:
        columns += ["new tok/s", "of all runs", "prompt and new tok/s"]
    elif section.repeat:
        columns += ["prefill tok/s", "of products", "decode tok/s", "of all runs", "MB per token", "of bandwidth"]
    if section.warm == section.prompt:
        columns.append("first token s")
    for row in rows:
        budget = "none" if row.system.budget is None else f"{row.system.budget / MiB:.0f}"
        cells = [row.name, str(len(row.counted)), budget, f"{row.peak / MiB:.0f}"]
        if section.batch > 1:
            tokens = section.prompt + section.new + 1
            everything = [rate * tokens / (section.new + 1) for rate in row.generated]
            cells += [median(row.generated, 1), spread(row.generated), median(everything)]
        elif section.repeat:
            read = row.system.bytes_per_token
            cells += [median(row.prefill), share(row.prefill, limits.prefill(section.prompt)), median(row.decode, 1)]
            cells += [spread(row.decode), f"{read / 1e6:.0f}", share(row.decode, limits.bandwidth / read)]
        if section.warm == section.prompt:
            cells.append(median(row.first_token, 1))
        lines.append(cells)
    return table(columns, lines)


def report(
    tables: dict[str, list[Row]], limits: Limits, watched: Machine, compressed: Compressed, seconds: float
) -> str:
    parts = [f"# tightfit beside other runtimes\n\nModel: {compressed.model.name}, {watched.threads} threads.\n"]
    versions: dict[str, str] = {}
    for rows in tables.values():
        parts.append(f"## {rows[0].section.title}\n\n{section_table(rows, limits)}\n")
        for row in rows:
            versions |= row.system.versions
    for weights, made in compressed.made.items():
        peak = made["peak_rss_bytes"] / MiB
        parts.append(f"`tightfit compress --weights {weights}`: {made['seconds']:.1f} s, peak {peak:.0f} MiB.\n")
    measured = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    parts.append(
        f"""Limits measured in the same call: memory {limits.bandwidth / 1e9:.1f} GB/s, torch's bfloat16 products
{limits.products / 1e9:.0f} GFLOP/s. "Of products" and "of bandwidth" are shares of what these allow.
"""
    )
    if watched.disturbed:
        some = "; ".join(watched.disturbed[:SHOWN_DISTURBANCES])
        parts.append(
            f"The machine was not quiet in {len(watched.disturbed)} runs ({some}), at most {watched.tries} tries.\n"
        )
    parts.append(f"Peers: {measured}." if measured else "No peers.")
    parts.append(f"Machine: {machine(watched.threads, 'torch')} tightfit at {commit()}.")
    parts.append(f"Command: `{command()}`, {seconds:.0f} s.\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="a JSON file")
    parser.add_argument("--model", type=Path, help="a folder of a llama in bfloat16")
    parser.add_argument("--preset", default="1b", choices=sorted(random_model.PRESETS))
    parser.add_argument("--weights", nargs="+", default=["int4", "int8", "bf16", "ternary"], metavar="FORMAT")
    parser.add_argument("--kv", nargs="*", default=["int4"], metavar="METHODS", help="caches for the long prompt")
    parser.add_argument("--levels", nargs="+", default=["avx2", "portable"], metavar="LEVEL")
    parser.add_argument("--folders", type=Path, help="where compressed models are, and stay")
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--turns", type=int, default=3, help="runs of each system")
    parser.add_argument("--tries", type=int, default=3, help="of a run while the machine is not quiet")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for an idle machine before a run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--out", type=Path, help="write the tables to a file")
    arguments = parser.parse_args()
    began, threads = time.monotonic(), arguments.threads
    with tempfile.TemporaryDirectory() as temporary:
        model = arguments.model or random_model.write(Path(temporary) / arguments.preset, arguments.preset)
        folders = arguments.folders or Path(temporary) / "compressed"
        folders.mkdir(parents=True, exist_ok=True)
        compressed = Compressed(model, folders)
        peers = peer_systems(arguments.peers) if arguments.peers else {}
        tables: dict[str, list[Row]] = {}
        for name in arguments.only:
            systems = [
                *tightfit_systems(name, model, compressed, arguments.weights, arguments.levels, arguments.kv, threads)
            ]
            systems += peers.get(name, [])
            if name == "start":
                systems = [
                    replace(system, name=f"{system.name}, {where}", cached=cached)
                    for system in systems
                    for where, cached in (("from the page cache", True), ("from the disk", False))
                ]
            tables[name] = [Row(system, SECTIONS[name]) for system in systems]
        watched = Machine(threads, arguments.tries, arguments.patience)
        for turn in range(arguments.turns):
            for name, rows in tables.items():
                for row in rows if turn < SECTIONS[name].turns else ():
                    row.runs.append(run(row.system, row.section, watched))
                    passed = time.monotonic() - began
                    print(f"{passed:.0f} s: turn {turn + 1}, {name}, {row.system.name}", file=sys.stderr)
        watched.finish()
        limits = Limits.of(model, watched.bandwidth, threads)
    text = report(tables, limits, watched, compressed, time.monotonic() - began)
    results = {name: [row.asdict() for row in rows] for name, rows in tables.items()}
    print(json.dumps({"limits": asdict(limits), "sections": results}, indent=1) if arguments.json else text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
