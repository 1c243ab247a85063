"""Joules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.lab.tasks.base import Metric, Reference, Sample, Task, lengths, positive
from tightfit.lab.tasks.texts import continued

if TYPE_CHECKING:
    from tightfit.lab.material import Material
    from tightfit.lab.reader import Reader

# Processors, and the memory that is counted beside them. Other zones are parts of these, or the same once more.
PROCESSOR, PART = re.compile(r"intel-rapl:\d+"), re.compile(r"intel-rapl:\d+:\d+")


@technique(
    seam="tasks",
    name="energy",
    paper="https://doi.org/10.1145/3177754",
    exact=True,
    summary="joules for each prompt token and each new one, where the machine counts them",
)
@dataclass(frozen=True)
class Energy(Task):
    """What processors and memory took meanwhile, by the counters of RAPL (Linux' powercap, in ``root``), for
    ``repetitions`` prompts of each length in ``tokens`` and ``new`` tokens after each. The whole machine is counted,
    idle cores and other processes included. Where there are no counters, or they can't be read (most systems let only
    root), there is no number, and ``reason`` says why."""

    repetitions: int = 5
    new: int = 64
    tokens: str = "50%"
    root: str = "/sys/class/powercap"

    metrics: ClassVar = (
        Metric("prompt_token", "J", "lower", "median"),
        Metric("new_token", "J", "lower", "median"),
    )

    def __post_init__(self) -> None:
        positive(self, "repetitions", "new")
        lengths(self.tokens, "tokens")

    def samples(self, material: Material, context: int, seed: int) -> list[Sample]:
        following = self.new + 1  # the last one is predicted, and not computed
        prompts = lengths(self.tokens, "tokens", context, besides=following)
        return list(continued(self, material, seed, prompts, self.repetitions, following))

    def measure(self, reader: Reader, sample: Sample, exact: Reference | None) -> dict[str, Any]:
        try:
            counters = [Counter(folder) for folder in zones(Path(self.root))]
        except UsageError as error:
            return {"prompt_token": None, "new_token": None, "reason": error.message}
        rows = reader.follow(sample.prompt, sample.following)
        next(rows)
        prompt = sum(counter.joules() for counter in counters)
        steps = sum(1 for _ in rows)
        new = sum(counter.joules() for counter in counters)
        return {"prompt_token": prompt / len(sample.prompt), "new_token": new / steps}


class Counter:
    """One zone's counter. It starts again at zero when it is full, which takes minutes."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = self._read()

    def joules(self) -> float:
        """Since the last call, or since it was made."""
        before, self._last = self._last, self._read()
        spent = self._last - before
        return (spent if spent >= 0 else spent + self._range) / 1e6

    def _read(self) -> int:
        return int(self._file.read_text())


def zones(root: Path) -> list[Path]:
    """The folders of the zones that add up to processors and memory. Raises UsageError where there are none that can be
    read."""
    folders = sorted(root.iterdir()) if root.is_dir() else []
    found = [folder for folder in folders if _is_counted(folder)]
    if not found:
        raise UsageError(f"this machine reports no energy: {root} has no processors")
    for folder in found:
        try:
            (folder / "energy_uj").read_text()
        except OSError as error:
            raise UsageError(f"{folder / 'energy_uj'} cannot be read: {error.strerror}") from error
    return found


def _is_counted(folder: Path) -> bool:
    if PART.fullmatch(folder.name):
        return (folder / "name").read_text().strip() == "dram"
    return bool(PROCESSOR.fullmatch(folder.name)) and (folder / "name").read_text().startswith("package")
