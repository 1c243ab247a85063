"""What the benchmarks share: processes measured from outside while the machine is quiet, its limits, tables."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tests.measure import Measured, run_measured

from tightfit.budget.machine import processor
from tightfit.plan.profile import measure_bandwidth
from tightfit.zoo import corpus

ROOT = Path(__file__).resolve().parent.parent
STAT = Path("/proc/stat")
MOST_FOREIGN, MOST_STEAL = 0.05, 0.03  # shares of all processor time beyond which a run does not count
LEAST_BANDWIDTH = 0.8  # of the best that was seen
PROBE_BYTES = 1 << 30

MATMUL = """
import sys, time, torch
threads, tokens, inputs, outputs = map(int, sys.argv[1:])
torch.set_num_threads(threads)
a, b = torch.randn(tokens, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
best = 1e9
for _ in range(20):
    start = time.perf_counter(); a @ b.T; best = min(best, time.perf_counter() - start)
print(2 * tokens * inputs * outputs / best)
"""


def best(calls: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Seconds that each of ``calls`` takes at best, in turns for so many ``seconds`` each, the first calls left out."""
    times = [float("inf")] * len(calls)
    for call in calls:
        call()
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            times[i] = min(times[i], time.perf_counter() - start)
    return times


def tightfit(*arguments: object) -> tuple[Any, int]:
    """What a tightfit command answers with --json, and the peak resident set of its process in bytes."""
    done = checked(run_measured([sys.executable, "-m", "tightfit", *map(str, arguments), "--json"], timeout=900))
    return json.loads(done.stdout), done.peak_bytes


def checked(done: Measured) -> Measured:
    if done.exit_code:
        raise SystemExit(f"exit status {done.exit_code}: {done.stderr}")
    return done


def matmul_rate(threads: int, tokens: int = 512, inputs: int = 2048, outputs: int = 5632) -> float:
    """Operations per second of torch's bfloat16 product of (tokens, inputs) by (inputs, outputs), the best of 20."""
    command = [sys.executable, "-c", MATMUL, threads, tokens, inputs, outputs]
    return float(checked(run_measured([str(part) for part in command])).stdout)


@dataclass(frozen=True)
class Ended:
    """How a command ended, when it began (seconds since the epoch), and whether the machine did nothing else."""

    done: Measured
    began: float
    quiet: bool


class Probe:
    """Reads a buffer that stays with ``threads`` threads, now and then: it is slower where others read memory too."""

    def __init__(self, threads: int) -> None:
        self._buffers = [np.ones(PROBE_BYTES // threads // 8) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)

    def read(self) -> float:
        """Bytes per second, the best of a few passes."""
        times = []
        for _ in range(3):
            start = time.perf_counter()
            list(self._pool.map(np.max, self._buffers))
            times.append(time.perf_counter() - start)
        return PROBE_BYTES / min(times)


class Machine:
    """Runs commands, tells which of them ran on a machine that did something else too, and measures its bandwidth.

    Other work shows in the processor time of all processes beside the command's own, in time that the hypervisor took
    ("steal"), and in the memory bandwidth before and after. ``disturbed`` says what was seen.
    """

    def __init__(self, threads: int, tries: int, patience: float) -> None:
        """A run is tried ``tries`` times, each after at most ``patience`` seconds of waiting for an idle machine."""
        self.threads, self.tries, self.patience = threads, tries, patience
        self.disturbed: list[str] = []
        wait_until_idle(patience)
        self.bandwidth = self._bandwidth()
        self._probe = Probe(threads)
        self.probes = [self._probe.read()]

    def _bandwidth(self) -> float:
        """Long enough to fill a buffer of several times a large cache."""
        return measure_bandwidth(self.threads, seconds=6).bytes_per_s

    def finish(self) -> None:
        """Measures the bandwidth a second time: the better counts."""
        wait_until_idle(self.patience)
        self.bandwidth = max(self.bandwidth, self._bandwidth())

    def run(
        self,
        command: Sequence[str | Path],
        env: Mapping[str, str],
        timeout: float,
        prepare: Callable[[], None] = lambda: None,
    ) -> Ended:
        """Runs a command after ``prepare``, again while the machine is disturbed: ``tries`` times in all."""
        for _ in range(self.tries):
            prepare()
            wait_until_idle(self.patience)
            before, began = _Times.now(), time.time()
            done = checked(run_measured(command, env={**os.environ, **env}, timeout=timeout))
            reasons = self._disturbances(_Times.now() - before, time.time() - began)
            if not reasons:
                break
            self.disturbed.append(reasons)
        return Ended(done, began, quiet=not reasons)

    def _disturbances(self, spent: _Times, seconds: float) -> str:
        """What else happened in the ``seconds`` just passed; empty if nothing did."""
        available = seconds * (os.cpu_count() or 1)
        foreign = spent.busy - spent.own
        self.probes.append(self._probe.read())
        bandwidth = min(self.probes[-2:])
        reasons = []
        if foreign > MOST_FOREIGN * available:
            reasons.append(f"others used {foreign:.1f} s of processor time")
        if spent.steal > MOST_STEAL * available:
            reasons.append(f"the hypervisor took {spent.steal:.1f} s")
        if bandwidth < LEAST_BANDWIDTH * max(self.probes):
            reasons.append(f"memory gave {bandwidth / 1e9:.1f} GB/s")
        return f"{', '.join(reasons)} in {seconds:.0f} s" if reasons else ""


@dataclass(frozen=True)
class _Times:
    """Processor seconds: of all processes, taken by the hypervisor, and of the children of this process."""

    busy: float
    steal: float
    own: float

    @staticmethod
    def now() -> _Times:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = children.ru_utime + children.ru_stime
        if not STAT.exists():  # only Linux tells: elsewhere every run looks quiet
            return _Times(own, 0.0, own)
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, STAT.read_text().split("\n")[0].split()[1:])
        tick = os.sysconf("SC_CLK_TCK")
        return _Times((user + nice + system + irq + softirq) / tick, steal / tick, own)

    def __sub__(self, other: _Times) -> _Times:
        return _Times(self.busy - other.busy, self.steal - other.steal, self.own - other.own)


def in_page_cache(model: Path, wanted: bool) -> None:
    """Reads the files of ``model``, or lets the operating system forget what it has of them."""
    for path in model.rglob("*") if model.is_dir() else [model]:
        if not path.is_file():
            continue
        with open(path, "rb", buffering=0) as file:
            if not wanted:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while wanted and file.read(16 << 20):
                pass


def wait_until_idle(patience: float) -> None:
    """Waits for a second in which little happens, for at most ``patience`` seconds."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        before = _Times.now()
        time.sleep(1)
        if (_Times.now() - before).busy < 0.1:
            return


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    rules = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rules, *rows))


def machine(threads: int, *packages: str) -> str:
    """One line about the machine and the versions of ``packages``."""
    model, features = processor()
    shown = ", ".join(name for name in features if name.startswith(("amx_", "avx512_vnni", "avx512f", "avx2", "asimd")))
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"{model} ({shown}), {threads} threads, {platform.system()} {platform.release()}; "
        f"Python {platform.python_version()}, {versions}."
    )


def held_out(folder: Path) -> tuple[list[str], int]:
    """The texts of the held-out files that are installed here, and how many names there are."""
    found, names = corpus.held_out(folder)
    return [text for _, text in found], names


def command() -> str:
    """What was typed, without folders."""
    return " ".join(["python", *(Path(argument).name if "/" in argument else argument for argument in sys.argv)])


def commit() -> str:
    """Which version of this repository runs."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(describe, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "not from git"
