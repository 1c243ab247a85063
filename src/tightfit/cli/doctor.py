"""``tightfit doctor``: what this machine has, how fast it is, and which kernels run on it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.budget.machine import MachineRecord, cache_folder, processor, usable_cores, versions
from tightfit.budget.meter import machine_memory
from tightfit.budget.units import format_bytes
from tightfit.errors import TightfitError

if TYPE_CHECKING:
    from rich.console import Group

# Instructions that a kernel may use, widest first.
KERNEL_FEATURES = [
    "amx_int8",
    "amx_bf16",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_vbmi",
    "avx512f",
    "avx_vnni",
    "avx2",
    "fma",
    "f16c",
    "sve2",
    "sve",
    "i8mm",
    "asimddp",
    "asimd",
]
RUNTIME_KEY = "imports"
USUAL = ("BF16",)  # types of the checkpoint that speeds of kernels are shown for


def collect(measure: bool, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """What there is to say about this machine, as JSON.

    With ``measure``, memory, disk, runtime and kernels are measured (about half a minute) and kept in the record of
    this machine; without, the last measurements are reported, and null where there are none. Bytes are counts, speeds
    bytes per second; of kernels they are as :class:`tightfit.plan.speeds.Speeds` has them, for a checkpoint in
    bfloat16.
    """
    memory = machine_memory()
    model, features = processor()
    record = MachineRecord.open()
    report: dict[str, Any] = {
        "versions": versions(),
        "processor": {"model": model, "cores": usable_cores(), "features": list(features)},
        "kernels": _kernels(),
        "memory": {
            "total_bytes": memory.total,
            "available_bytes": memory.available,
            "limited_by": memory.limited_by,
            "source": memory.source,
        },
        "runtime": None,
        "bandwidth": [{"threads": threads, "bytes_per_s": rate} for threads, rate in record.memory_bandwidth.items()],
        "speeds": _speeds(record),
        "disk": [{"device": device, "bytes_per_s": rate} for device, rate in record.disk_bandwidth.items()],
        "gpu": _gpus(),
        "cache_folder": {"path": str(cache_folder()), "writable": _writable(cache_folder())},
        "problems": [],
    }
    if measure:
        report |= _measure(record, usable_cores(), progress)
    elif (resident := record.get(RUNTIME_KEY)) is not None:
        report["runtime"] = {"resident_bytes": resident}
    return report


def _speeds(record: MachineRecord) -> dict[str, Any] | None:
    """Of the engine's kernels, where they were measured."""
    from tightfit.engine.numerics import numerics
    from tightfit.plan.speeds import known_speeds

    known = known_speeds(record, usable_cores(), numerics(USUAL, "int8"))
    return None if known is None else known.model_dump(mode="json", exclude={"disk"})


def _measure(record: MachineRecord, cores: int, progress: Callable[[int, int], None]) -> dict[str, Any]:
    from tightfit.engine.numerics import numerics
    from tightfit.plan.profile import measure_bandwidth, measure_disk, measure_runtime, measured_speeds

    problems = []
    bandwidth = [measure_bandwidth(threads) for threads in sorted({1, cores})]
    record.memory_bandwidth |= {each.threads: each.bytes_per_s for each in bandwidth}
    disks, runtime = [], None
    try:
        disk = measure_disk(_existing(cache_folder()))
        record.disk_bandwidth[disk.device] = disk.bytes_per_s
        disks.append(asdict(disk))
    except TightfitError as error:
        problems.append(str(error))
    try:
        resident = measure_runtime()
        record.put(RUNTIME_KEY, resident.current)
        runtime = {"resident_bytes": resident.current}
    except TightfitError as error:
        problems.append(str(error))
    record.disks.clear()  # of each the next plan for a model on it measures anew
    record.save(replace={"disks"})
    measured_speeds(record, cores, numerics(USUAL, "int8"), progress=progress, again=True)
    return {
        "speeds": _speeds(record),
        "bandwidth": [asdict(each) for each in bandwidth],
        "disk": disks,
        "runtime": runtime,
        "problems": problems,
    }


def _kernels() -> dict[str, Any]:
    """Which compiled kernels run here, and if they do not load, why not."""
    try:
        kernels = importlib.import_module("tightfit.kernels.cpu")
    except ImportError as error:
        return {"compiled": False, "supported": ["reference"], "chosen": "reference", "reason": str(error)}
    features = kernels.features()
    reason = None if features["compiled"] else "this installation was made without a compiler"
    return {key: features[key] for key in ("compiled", "supported", "chosen")} | {"reason": reason}


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [
        {
            "name": device.name,
            "memory_bytes": device.total_memory,
            "compute_capability": f"{device.major}.{device.minor}",
        }
        for device in devices
    ]


def _existing(folder: Path) -> Path:
    """``folder``, or the nearest folder above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())


def _writable(folder: Path) -> bool:
    return os.access(_existing(folder), os.W_OK)


def render(report: dict[str, Any]) -> Group:
    """The report of :func:`collect` as a table to print."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, lines in _lines(report).items():
        table.add_row(name, escape("\n".join(lines)))
    return Group(table, *(escape(f"Problem: {problem}") for problem in report["problems"]))


def _lines(report: dict[str, Any]) -> dict[str, list[str]]:
    chip, memory, kernels, cache = (report[key] for key in ("processor", "memory", "kernels", "cache_folder"))
    features = [name for name in KERNEL_FEATURES if name in chip["features"]]
    runtime = report["runtime"]
    unmeasured = ["not measured yet"]
    return {
        "versions": [", ".join(f"{name} {version}" for name, version in report["versions"].items())],
        "processor": [f"{chip['model']}, {chip['cores']} cores to use", " ".join(features) or "features unknown"],
        "kernels": [
            f"{kernels['chosen']} (this machine can run {', '.join(kernels['supported'])})"
            if kernels["compiled"]
            else f"not compiled: torch runs everything, slower ({kernels['reason']})"
        ],
        "memory": [
            f"{format_bytes(memory['total_bytes'])} (limit: {memory['limited_by']}), "
            f"{format_bytes(memory['available_bytes'])} available (by {memory['source']})"
        ],
        "runtime": [f"{format_bytes(runtime['resident_bytes'])} after imports"] if runtime else unmeasured,
        "bandwidth": [_bandwidth(each) for each in report["bandwidth"]] or unmeasured,
        **_kernel_lines(report["speeds"]),
        "disk": [_disk(each) for each in report["disk"]] or unmeasured,
        "gpu": [f"{gpu['name']}, {format_bytes(gpu['memory_bytes'])}" for gpu in report["gpu"]] or ["none"],
        "cache folder": [cache["path"] + ("" if cache["writable"] else " (cannot be written: nothing is remembered)")],
    }


def _speed(rate: float) -> str:
    return f"{rate / 1e9:.1f} GB/s"


def _kernel_lines(speeds: dict[str, Any] | None) -> dict[str, list[str]]:
    """How fast matrices are read when decoding, and multiplied with in prompts."""
    if speeds is None:
        return {"products": ["not measured yet"]}
    lines = []
    for fmt, speed in speeds["formats"].items():
        tokens = max(speed["product"], key=int)
        rate = 2 * int(tokens) / speed["product"][tokens]
        lines.append(
            f"{fmt}: {1e-9 / speed['vector']['1']:.1f} GB/s decoding, {rate / 1e12:.2f} Top/s in chunks of {tokens}"
        )
    return {"products": lines}


def _bandwidth(each: dict[str, Any]) -> str:
    line = f"{_speed(each['bytes_per_s'])} with {each['threads']} thread{'s' if each['threads'] > 1 else ''}"
    if "buffer_bytes" not in each:
        return line
    line += f", reading {format_bytes(each['buffer_bytes'])}"
    if each["buffer_bytes"] < 2 * each["cache_bytes"]:
        line += f" (partly the cache of {format_bytes(each['cache_bytes'])}: memory may be slower)"
    return line


def _disk(each: dict[str, Any]) -> str:
    line = f"{_speed(each['bytes_per_s'])} from device {each['device']}"
    if "method" not in each:
        return line
    doubt = "" if each["method"] == "direct" else ", perhaps partly from the page cache"
    return f"{line} ({each['filesystem']}, {each['method']} reads of {format_bytes(each['read_bytes'])}{doubt})"
