"""Energy from a folder that looks like /sys/class/powercap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tightfit.errors import UsageError
from tightfit.lab.tasks import Sample
from tightfit.lab.tasks.energy import Counter, Energy, zones

FULL = 262143328850  # microjoules, as Intel's server processors say


def zone(root: Path, folder: str, name: str, energy: int = 0) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{energy}\n")
    (path / "max_energy_range_uj").write_text(f"{FULL}\n")
    return path


def test_processors_and_memory_are_counted_once(tmp_path: Path) -> None:
    for folder, name in (
        ("intel-rapl", "intel-rapl"),
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:0:0", "core"),  # part of the package
        ("intel-rapl:0:1", "dram"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:2", "psys"),  # the whole machine, packages included
        ("intel-rapl-mmio:0", "package-0"),  # the same counter by another way
    ):
        zone(tmp_path, folder, name)
    assert [path.name for path in zones(tmp_path)] == ["intel-rapl:0", "intel-rapl:0:1", "intel-rapl:1"]


def test_a_counter_that_starts_again_goes_on(tmp_path: Path) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", FULL - 3_000_000)
    counter = Counter(path)
    (path / "energy_uj").write_text("2000000\n")
    assert counter.joules() == pytest.approx(5)
    (path / "energy_uj").write_text("2500000\n")
    assert counter.joules() == pytest.approx(0.5)


class Spending:
    """A model that takes 6 J for a prompt and 2 J for each token after it, in two zones."""

    def __init__(self, folders: list[Path]) -> None:
        self._folders = folders

    def follow(self, prompt: list[int], following: list[int]) -> Iterator[None]:
        for index in range(len(following)):
            for folder in self._folders:
                before = int((folder / "energy_uj").read_text())
                (folder / "energy_uj").write_text(str((before + (1_000_000 if index else 3_000_000)) % FULL))
            yield None


def test_joules_are_of_prompt_tokens_and_new_tokens(tmp_path: Path) -> None:
    folders = [zone(tmp_path, "intel-rapl:0", "package-0", FULL - 5_000_000), zone(tmp_path, "intel-rapl:0:0", "dram")]
    reader: Any = Spending(folders)
    values = Energy(root=str(tmp_path)).measure(reader, Sample("", {}, [1] * 12, [1] * 5), None)
    assert values == {"prompt_token": pytest.approx(6 / 12), "new_token": pytest.approx(2)}


def test_where_nothing_is_counted_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader: Any = SimpleNamespace()  # is not used
    sample = Sample("", {}, [1], [1, 1])
    values = Energy(root=str(tmp_path / "none")).measure(reader, sample, None)
    assert (values["prompt_token"], values["new_token"]) == (None, None)
    assert "no processors" in values["reason"]
    assert Energy().summarise([values]) == {}

    zone(tmp_path, "intel-rapl:0", "package-0")

    def refuse(path: Path) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return "package-0\n"

    monkeypatch.setattr(Path, "read_text", refuse)  # root may read any file
    values = Energy(root=str(tmp_path)).measure(reader, sample, None)
    assert "Permission denied" in values["reason"]
    with pytest.raises(UsageError, match="cannot be read"):
        zones(tmp_path)
