"""From the start of a process to its first token: weights as a checkpoint has them, quantised while loading, and
compressed before.

    .venv/bin/python benchmarks/loading.py [--model FOLDER] [--weights int4] [--repeat 3] [--out FILE.md]

Without --model a random llama of 1.05 billion parameters in bfloat16 is written to a temporary folder (2.1 GB). Every
run is a process of its own, the systems take turns, and the table gives the fastest of each and the median. `cold`: the
page cache was asked to forget the weights (posix_fadvise); `warm`: they were read before. The limits are what reading
the same bytes takes and nothing else: from the disk past the page cache, or a copy from the page cache with as many
threads. What a process needs that loads next to nothing (the embedded model) is the first row.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import random_model

BLOCK = 4 << 20
COLUMNS = ("weights", "page cache", "read MiB", "first token s (median)", "limit of reading s")


@dataclass
class System:
    """A model, how it is to be run, and how long each run took in seconds."""

    name: str
    folder: Path | str
    options: tuple[str, ...] = ()
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"cold": [], "warm": []})

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors")) if isinstance(self.folder, Path) else []

    @property
    def nbytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def first_token(system: System, memory: str, threads: int) -> float:
    """Seconds until the first text of a process that generates."""
    command = [sys.executable, "-m", "tightfit", "run", str(system.folder), "-p", "Once", "-n", "8", "--ignore-eos"]
    command += ["--memory", memory, "--threads", str(threads), "--context", "256", *system.options]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        text = process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.stdout.read()
        errors = process.stderr.read()
    if process.returncode or not text:
        raise SystemExit(f"exit status {process.returncode}: {errors.decode()}")
    return seconds


def forget(files: list[Path]) -> None:
    """Asks the page cache to drop them."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(files: list[Path], threads: int) -> float:
    """Seconds that it takes to read the files through the page cache into memory that is there already."""

    def blocks() -> Iterator[tuple[int, int]]:
        for descriptor in descriptors:
            for position in range(0, os.fstat(descriptor).st_size, BLOCK):
                yield descriptor, position

    def read(worker: int) -> None:
        buffer = bytearray(BLOCK)
        for descriptor, position in list(blocks())[worker::threads]:
            os.preadv(descriptor, [buffer], position)

    descriptors = [os.open(file, os.O_RDONLY) for file in files]
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
    seconds = time.perf_counter() - began
    for descriptor in descriptors:
        os.close(descriptor)
    return seconds


def compress(folder: Path, weights: str, out: Path) -> Path:
    command = [sys.executable, "-m", "tightfit", "compress", str(folder), "--weights", weights, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    print(done.stdout, file=sys.stderr)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where temporary files go: the disk to measure")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from tightfit.budget.machine import processor
    from tightfit.plan.profile import measure_disk

    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = arguments.model or random_model.write(Path(temporary) / "1b", "1b")
        small = compress(folder, arguments.weights, Path(temporary) / "small")
        systems = [
            System("none but the embedded model's", "nano"),
            System("as in the checkpoint", folder, ("--weights", "bf16")),
            System(f"{arguments.weights} while loading", folder, ("--weights", arguments.weights)),
            System(f"{arguments.weights} from a compressed folder", small),
        ]
        limits: dict[tuple[str, str], float] = {}
        for turn in range(arguments.repeat):
            for system in systems:
                for cache in ("cold", "warm") if system.files else ("warm",):
                    if cache == "cold":
                        forget(system.files)
                    else:
                        copied = min(copy(system.files, arguments.threads) for _ in range(2))
                        limits[system.name, cache] = min(limits.get((system.name, cache), copied), copied)
                    system.seconds[cache].append(first_token(system, arguments.memory, arguments.threads))
                    print(f"{turn + 1}/{arguments.repeat} {system.name}, {cache}", file=sys.stderr)
        disk = measure_disk(small / "tightfit.safetensors")
        for system in systems:
            limits[system.name, "cold"] = system.nbytes / disk.bytes_per_s
        lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        for system in systems:
            for cache, seconds in system.seconds.items():
                if seconds:
                    shown = f"{min(seconds):.2f} ({statistics.median(seconds):.2f})"
                    limit = f"{limits[system.name, cache]:.2f}" if system.files else ""
                    lines.append(f"| {system.name} | {cache} | {system.nbytes / 2**20:.0f} | {shown} | {limit} |")
    text = "\n".join(
        [
            "# From the start of the process to the first token",
            "",
            f"Model: {folder.name}, {arguments.threads} threads, fastest of {arguments.repeat}",
            "",
            *lines,
            "",
            f"Disk: {disk.bytes_per_s / 1e9:.2f} GB/s ({disk.filesystem}, {disk.method} reads).",
            f"Machine: {processor()[0]}, {platform.system()} {platform.release()}, Python {platform.python_version()}.",
            "",
            "Command: `" + " ".join(["python", "benchmarks/loading.py", *sys.argv[1:]]) + "`",
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
