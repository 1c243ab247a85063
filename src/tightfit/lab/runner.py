"""Runs an experiment: a process for each configuration, so that its peak is its own, and a line in the results for each
sample, so that a run that was ended goes on where it was."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol

from tightfit import child, zoo
from tightfit.budget.machine import machine_identity, versions
from tightfit.catalog import parse_one, spec_string, split
from tightfit.engine.opening import DEFAULT_CONTEXT, Wish, open_model
from tightfit.errors import BudgetError, CheckpointError, FileError, TightfitError, UsageError
from tightfit.kernels import cpu
from tightfit.lab.experiment import EXACT, Configuration, Experiment, configurations
from tightfit.lab.material import Material
from tightfit.lab.results import REFERENCE, Adding, End, Refused, Results, SampleResult
from tightfit.lab.tasks.base import Sample

SUBJECT = "from tightfit.lab.subject import main; main()"
ERRORS = {kind.__name__: kind for kind in (UsageError, CheckpointError)}

Samples = dict[str, list[Sample]]  # of each task, by its spec string


@dataclass(frozen=True)
class State:
    """How far a run is, in samples: ``configuration`` is the one at work, ``left`` the seconds that the rest will take,
    None before there is anything to tell it from."""

    configuration: str
    done: int
    total: int
    left: float | None


class Watcher(Protocol):
    """Is told how far a run is: when a configuration begins, after each sample, and what came of the configuration."""

    def at(self, state: State) -> None: ...

    def ended(self, configuration: str, outcome: End | Refused) -> None: ...


@dataclass
class Pace:
    """What things took so far, to tell what the rest will take."""

    samples: dict[str, list[float]] = field(default_factory=dict)  # seconds, by task
    processes: list[float] = field(default_factory=list)  # seconds of each beside its samples

    def left(self, missing: Counter[str], processes: int) -> float | None:
        """Seconds that ``missing`` samples of each task take, in so many processes."""
        known = [seconds for of_task in self.samples.values() for seconds in of_task]
        if not known:
            return None
        total = processes * _mean(self.processes or [0.0])
        return total + sum(count * _mean(self.samples.get(task, known)) for task, count in missing.items())


def prepare(
    model: str,
    varied: Sequence[str],
    tasks: str,
    common: Mapping[str, Any],
    exact: str | None = None,
    seed: int = 0,
    texts: Sequence[Path] = (),
    command: str = "",
) -> tuple[Experiment, Samples]:
    """An experiment with ``model``, and its samples, which fit into the smallest context that a configuration has.

    ``tasks`` are spec strings with commas between them; for ``varied``, ``common`` and ``exact`` see
    :func:`~tightfit.lab.experiment.configurations`, for ``texts`` :class:`~tightfit.lab.material.Material`. Raises
    UsageError for what makes no sense, CheckpointError for a model that cannot be opened.
    """
    chosen = [parse_one("tasks", task) for task in split(tasks, ",", tasks)]
    first, *others = configurations(varied, common, exact)
    opened = open_model(Wish(model, **common))
    with opened.checkpoint as checkpoint:
        usual = min(opened.spec.context, DEFAULT_CONTEXT)
        context = min(each.wish.get("context", usual) for each in others)
        first = replace(first, wish=first.wish | {"context": context})
        folder = zoo.path(model) if model in zoo.EMBEDDED else None
        material = Material.read(checkpoint.tokenizer(), folder, texts)
        samples = {spec_string(task): task.samples(material, context, seed) for task in chosen}
        known, kernels = versions(), {"kernels": cpu.features()["chosen"]}
        experiment = Experiment(
            model=checkpoint.name,
            fingerprint=checkpoint.fingerprint,
            tasks=list(samples),
            seed=seed,
            context=context,
            text=[asdict(source) for source in material.sources],
            common={name: value for name, value in common.items() if value is not None},
            configurations=[first, *others],
            machine={name: value for name, value in machine_identity().items() if name not in known} | kernels,
            versions=known,
            command=command,
        )
    return experiment, samples


def run(results: Results, samples: Samples, model: str, watcher: Watcher) -> None:
    """Measures what is not in ``results`` yet: of each configuration every one of ``samples``, the exact model's first.
    ``model`` is where it is opened. What was refused is asked again, and so is what crashed.

    Raises what the exact model is refused with, and TightfitError if it crashes: without it there is nothing to compare
    with.
    """
    with results.adding() as adding:
        _Run(results, adding, samples, model, watcher).run()


class _Run:
    def __init__(self, results: Results, adding: Adding, samples: Samples, model: str, watcher: Watcher) -> None:
        self.results = results
        self.adding = adding
        self.samples = samples
        self.model = model
        self.watcher = watcher
        self.pace = Pace()
        for found in results.samples.values():
            self.pace.samples.setdefault(found.task, []).append(found.seconds)
        self.todo = [each for each in results.experiment.configurations if each.key not in results.ends]
        self.missing: Counter[str] = Counter(task for each in self.todo for task, _ in self._missing(each))
        self.total = len(results.experiment.configurations) * sum(map(len, samples.values()))

    def run(self) -> None:
        while self.todo:
            configuration = self.todo[0]
            self._tell()
            outcome = self._measure(configuration)
            self.missing -= Counter(task for task, _ in self._missing(configuration))  # of one that was refused
            del self.todo[0]
            if outcome != self.results.refused.get(configuration.key):
                self.adding.add(outcome)
            self.watcher.ended(configuration.key, outcome)

    def _measure(self, configuration: Configuration) -> End | Refused:
        """Adds what is missing of a configuration; gives what is to be added at its end."""
        began, in_samples = time.perf_counter(), 0.0
        exact = configuration.key == EXACT
        asked = {
            "wish": {"model": self.model, **configuration.wish},
            "tasks": list(self.samples),
            "reference": str(self.results.folder / REFERENCE),
            "exact": exact,
        }
        with _process() as process:
            try:
                process.ask(asked)
                for task, sample in self._missing(configuration):
                    answer = process.ask({"task": task, "sample": asdict(sample)})
                    found = SampleResult(configuration.key, task, sample.key, sample.group, **answer)
                    self.adding.add(found)
                    self.pace.samples.setdefault(task, []).append(found.seconds)
                    in_samples += found.seconds
                    self.missing[task] -= 1
                    self._tell()
                longest = max((each for of_task in self.samples.values() for each in of_task), key=_length)
                answer = process.ask({"longest": asdict(longest)})
            except _RefusedError as refusal:
                if exact:
                    raise refusal.as_error() from None
                return Refused(configuration.key, **refusal.answer)
            except _CrashedError as crash:
                if exact:
                    raise TightfitError(f"the exact model's process {crash}", "The same command tries again.") from None
                return Refused(configuration.key, f"its process {crash}", "The same command tries again.", None, True)
        seconds = time.perf_counter() - began
        self.pace.processes.append(seconds - in_samples)
        return End(configuration.key, seconds=seconds, **answer)

    def _missing(self, configuration: Configuration) -> list[tuple[str, Sample]]:
        known = self.results.samples
        every = ((task, sample) for task, of_task in self.samples.items() for sample in of_task)
        return [(task, sample) for task, sample in every if (configuration.key, task, sample.key) not in known]

    def _tell(self) -> None:
        left = self.pace.left(self.missing, len(self.todo))
        done = self.total - self.missing.total()
        self.watcher.at(State(self.todo[0].key, done, self.total, left))


class _RefusedError(Exception):
    """The subject's answer is that it cannot be had."""

    def __init__(self, kind: str, answer: dict[str, Any]) -> None:
        self.kind, self.answer = kind, answer

    def as_error(self) -> TightfitError:
        """What it is for the user if the exact model is refused."""
        if self.kind == FileError.__name__:
            return FileError(self.answer["error"], self.answer["hint"])
        hint = 'Compare with another one, for example --exact "weights=bf16".'
        message = f"the exact model is refused: {self.answer['error']}"
        if self.kind == BudgetError.__name__:
            return BudgetError(message, hint, self.answer["smallest_bytes"])
        return ERRORS.get(self.kind, TightfitError)(message, hint)


class _CrashedError(Exception):
    """How the subject ended that should have answered."""


@dataclass
class _Process:
    """A subject. Questions and answers are JSON, one in each line."""

    popen: subprocess.Popen[str]
    errors: IO[str]

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        with suppress(BrokenPipeError):  # it has ended: what it said last, if anything, says why
            self.popen.stdin.write(json.dumps(question) + "\n")
            self.popen.stdin.flush()
        line = self.popen.stdout.readline()
        if not line.endswith("\n"):
            raise _CrashedError(self._how_it_ended())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _RefusedError(answer.pop("kind"), answer)
        return answer

    def _how_it_ended(self) -> str:
        status = self.popen.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}{last}"
        return f"ended with status {status}{last}"


@contextmanager
def _process() -> Iterator[_Process]:
    """A subject that ends here at the latest."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        popen = subprocess.Popen(
            child.command(SUBJECT),
            env=child.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield _Process(popen, errors)
        finally:
            popen.kill()
            with suppress(BrokenPipeError):
                popen.__exit__(None, None, None)


def _length(sample: Sample) -> int:
    return len(sample.prompt) + len(sample.following) + sample.new_tokens


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
