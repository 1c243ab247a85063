"""`tightfit doctor` tells what is there, as JSON with stable keys and as a table."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.plan import fake_speeds

from tightfit.budget.machine import MachineRecord
from tightfit.budget.units import MiB
from tightfit.cli import doctor
from tightfit.errors import UsageError
from tightfit.plan import profile
from tightfit.plan.profile import DiskBandwidth, MemoryBandwidth
from tightfit.plan.schema import Numerics
from tightfit.plan.speeds import speeds_key

KEYS = {
    "versions": {"python", "torch", "tightfit"},
    "processor": {"model", "cores", "features"},
    "kernels": {"compiled", "supported", "chosen", "reason"},
    "memory": {"total_bytes", "available_bytes", "limited_by", "source"},
    "cache_folder": {"path", "writable"},
}
LISTS = {"bandwidth", "disk", "gpu", "problems"}
MAYBE = {"runtime", "speeds"}  # null before they were measured


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements of a machine with a large cache, at once; how they are made is tested elsewhere."""
    monkeypatch.setattr(
        profile, "measure_bandwidth", lambda threads: MemoryBandwidth(threads * 1e10, threads, 600 * MiB, 480 * MiB, 9)
    )

    def measured_speeds(record: MachineRecord, threads: int, numerics: Numerics, **options: object) -> None:
        speeds = fake_speeds.speeds(threads=threads, numerics=numerics)
        record.speeds[speeds_key(threads, numerics)] = speeds.model_dump(mode="json", exclude={"disk"})
        record.save()

    monkeypatch.setattr(profile, "measured_speeds", measured_speeds)
    monkeypatch.setattr(
        profile, "measure_disk", lambda path: DiskBandwidth(2.5e9, 256 * MiB, "fadvise", "254:0", "ext4")
    )


def text_of(report: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(doctor.render(report))
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_the_keys_are_stable_and_the_report_is_json() -> None:
    report = json.loads(json.dumps(doctor.collect(measure=False)))
    assert set(report) == set(KEYS) | LISTS | MAYBE
    for key, inner in KEYS.items():
        assert set(report[key]) == inner
    assert all(isinstance(report[key], list) for key in LISTS)


def test_nothing_is_measured_unless_it_is_asked_for(cache: Path) -> None:
    report = doctor.collect(measure=False)
    assert (report["bandwidth"], report["disk"], report["runtime"], report["speeds"]) == ([], [], None, None)
    assert not cache.exists()
    assert text_of(report).count("not measured yet") == 4


def test_measurements_are_reported_and_remembered(quick: None) -> None:
    measured = doctor.collect(measure=True)
    assert {each["threads"] for each in measured["bandwidth"]} == {1, measured["processor"]["cores"]}
    assert measured["disk"][0]["bytes_per_s"] == 2.5e9
    assert measured["runtime"]["resident_bytes"] > 100 * MiB  # torch alone
    remembered = doctor.collect(measure=False)
    assert remembered["runtime"] == measured["runtime"]
    assert remembered["disk"] == [{"device": "254:0", "bytes_per_s": 2.5e9}]
    assert {"threads": 1, "bytes_per_s": 1e10} in remembered["bandwidth"]
    assert remembered["speeds"] == measured["speeds"]
    text = text_of(measured)
    assert "bf16: 10.0 GB/s decoding, 2.56 Top/s in chunks of 512" in text
    assert "10.0 GB/s with 1 thread, reading 600 MiB (partly the cache of 480 MiB" in text
    assert "2.5 GB/s from device 254:0 (ext4, fadvise reads of 256 MiB, perhaps partly from the page cache)" in text


def test_a_disk_that_cannot_be_measured_is_a_problem_and_not_the_end(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> DiskBandwidth:
        raise UsageError("The disk [/cache] cannot be measured.", "Name a folder.")

    monkeypatch.setattr(profile, "measure_disk", refuse)
    monkeypatch.setattr(profile, "ENGINE_IMPORTS", ())
    report = doctor.collect(measure=True)
    assert report["disk"] == []
    assert report["problems"] == ["The disk [/cache] cannot be measured.\nName a folder."]
    assert "Problem: The disk [/cache] cannot be measured." in text_of(report)


def test_missing_kernels_are_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError("undefined symbol: xyz")

    monkeypatch.setattr(doctor.importlib, "import_module", missing)
    report = doctor.collect(measure=False)
    assert not report["kernels"]["compiled"]
    assert report["kernels"]["chosen"] == "reference"
    assert "not compiled: torch runs everything, slower (undefined symbol: xyz)" in text_of(report)


def test_a_cache_folder_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor.collect(measure=False)
    assert report["cache_folder"]["writable"]
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    report = doctor.collect(measure=False)
    assert not report["cache_folder"]["writable"]
    assert "cannot be written" in text_of(report)


def test_gpus_are_listed_where_torch_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Device:
        name, total_memory, major, minor = "Some GPU", 80 << 30, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Device())
    report = doctor.collect(measure=False)
    assert report["gpu"] == [{"name": "Some GPU", "memory_bytes": 80 << 30, "compute_capability": "9.0"}]
    assert "Some GPU, 80 GiB" in text_of(report)
