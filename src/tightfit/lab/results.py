"""The results of an experiment: a folder with ``experiment.json`` and ``results.jsonl``, to which each result is added
as soon as it is there."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from io import FileIO
from pathlib import Path
from typing import Any

from tightfit.budget.machine import write_atomically
from tightfit.errors import FileError, UsageError
from tightfit.lab.experiment import Experiment

EXPERIMENT, RESULTS, REFERENCE = "experiment.json", "results.jsonl", "reference"


@dataclass(frozen=True)
class SampleResult:
    """What one configuration gave on one sample of a task: ``values`` has a number for each of the task's metrics, None
    where there is none, and what else its summary needs. ``group`` is what results are shown by."""

    configuration: str
    task: str
    sample: str
    group: dict[str, int | str]
    values: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class End:
    """What one configuration took, all of its samples being measured. ``peak_rss_bytes`` is of the process that
    measured the last of them, ``seconds`` its whole life; ``indicators`` are what
    :func:`tightfit.lab.indicators.indicators` gives."""

    configuration: str
    peak_rss_bytes: int
    budget_bytes: int
    plan: dict[str, Any]
    receipt: dict[str, Any]
    indicators: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Refused:
    """Why there is nothing of a configuration, or not all: it cannot be had, or its process ``crashed``."""

    configuration: str
    error: str
    hint: str
    smallest_bytes: int | None = None
    crashed: bool = False


Record = SampleResult | End | Refused
KINDS: dict[str, type[Record]] = {"sample": SampleResult, "end": End, "refused": Refused}


def to_line(record: Record) -> str:
    """The line of ``results.jsonl``, with its end."""
    kind = next(name for name, cls in KINDS.items() if isinstance(record, cls))
    return json.dumps({"kind": kind} | {each.name: getattr(record, each.name) for each in fields(record)}) + "\n"


def of_line(line: str) -> Record:
    """The inverse of :func:`to_line`. Raises ValueError, KeyError or TypeError for anything else."""
    values = json.loads(line)
    return KINDS[values.pop("kind")](**values)


@dataclass
class Results:
    """What is in a folder. ``samples`` by (configuration, task, sample), ``ends`` and ``refused`` by configuration; one
    that ended was not refused, or only before."""

    folder: Path
    experiment: Experiment
    samples: dict[tuple[str, str, str], SampleResult] = field(default_factory=dict)
    ends: dict[str, End] = field(default_factory=dict)
    refused: dict[str, Refused] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Results:
        """Reads a folder. Raises UsageError for one that holds no results, or others than we write."""
        try:
            experiment = Experiment.of_json(json.loads((folder / EXPERIMENT).read_text()))
        except FileNotFoundError:
            raise UsageError(f"{folder} holds no results", "`tightfit lab run ... --out FOLDER` makes some.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{folder / EXPERIMENT} is not an experiment: {error!r}",
                "Measure in a new folder, or read this one with the tightfit that wrote it.",
            ) from error
        results = cls(folder, experiment)
        for record in _records(folder / RESULTS):
            results.keep(record)
        return results

    @property
    def empty(self) -> bool:
        return not (self.samples or self.ends or self.refused)

    def keep(self, record: Record) -> None:
        """Takes up one more."""
        if isinstance(record, SampleResult):
            self.samples[record.configuration, record.task, record.sample] = record
        elif isinstance(record, End):
            self.ends[record.configuration] = record
            self.refused.pop(record.configuration, None)
        else:
            self.refused[record.configuration] = record

    @contextmanager
    def adding(self) -> Iterator[Adding]:
        """Holds the file open, and for itself. Raises UsageError if another process does."""
        path = self.folder / RESULTS
        try:
            file = FileIO(path, "a")
        except OSError as error:
            raise FileError(f"{path} cannot be written: {error.strerror}", "Name another folder with --out.") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(f"{self.folder} is being written by another run", "Wait for its end.") from None
            file.truncate(_whole(path.read_bytes()))
            yield Adding(self, file)


class Adding:
    """Adds results to a folder, each on the disk before the next is measured."""

    def __init__(self, results: Results, file: FileIO) -> None:
        self._results = results
        self._file = file

    def add(self, record: Record) -> None:
        """Raises FileError, as when the disk is full."""
        try:
            left = to_line(record).encode()
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise FileError(
                f"{self._file.name} cannot be written: {error.strerror}", "The same command goes on when it can be."
            ) from error
        self._results.keep(record)


def begin(folder: Path, experiment: Experiment) -> Results:
    """The results of ``experiment`` in a folder: new ones, or those that are there already. Raises UsageError if the
    folder holds something else, and says what differs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / EXPERIMENT).exists():
            results = Results.open(folder)
            difference = results.experiment.difference(experiment)
            if difference is None:
                return results
            if not results.empty:
                raise UsageError(
                    f"{folder} holds results of another experiment; {difference}", "Name a new folder with --out."
                )
        elif any(folder.iterdir()):
            raise UsageError(f"{folder} holds other files", "Name a new or empty folder with --out.")
        write_atomically(folder / EXPERIMENT, experiment.to_json())
    except OSError as error:
        raise FileError(f"{folder} cannot be written: {error.strerror}", "Name another with --out.") from error
    return Results(folder, experiment)


def _records(path: Path) -> Iterator[Record]:
    """The records of a file, less a last line that was not written to its end. Raises UsageError, naming the line, for
    anything else that we did not write."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for number, line in enumerate(content[: _whole(content)].splitlines(), start=1):
        try:
            yield of_line(line.decode())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"line {number} of {path} is damaged: {error!r}", "Take the line out: what it held is measured again."
            ) from error


def _whole(content: bytes) -> int:
    """How many bytes the whole lines take."""
    return content.rfind(b"\n") + 1
