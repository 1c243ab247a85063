"""What an experiment found: every number of the report, from the two files of a folder of results.

:func:`summarise` gives them all; the page (:mod:`tightfit.lab.page`), the terminal's table and ``--json`` only show
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import combinations, permutations
from typing import Any, Literal

from tightfit.catalog import parse_one
from tightfit.lab.experiment import EXACT, Configuration, Experiment
from tightfit.lab.results import Refused, Results, SampleResult
from tightfit.lab.statistics import Estimate
from tightfit.lab.tasks.base import Task

SEAMS = ("weights", "kv")
COST_UNITS = ("bytes", "s", "J")  # of metrics that are about what a model takes, and not about what it writes
LENGTHS = ("tokens", "after")  # groups of samples that say how long their prompts are
SPEED = ("latency", "token")  # the task and metric of the seconds that each new token takes
BASELINE = "int8"  # what a lossy technique must beat in either seam: it is simple, and loses next to nothing
PEAK, STORED, SECONDS = "peak_rss_bytes", "stored_bytes", "seconds_per_token"
MARKS = {PEAK: "M", STORED: "B", SECONDS: "T"}  # what quality is drawn against, and marks of who is on such a front
COSTS = tuple(MARKS)
# What a configuration costs, and by which share two must differ before they do: bytes and operations are counted, so
# there is no noise in them and the share only leaves out what nobody cares for; peaks and seconds are measured, and
# seconds must differ by their paired interval too.
INDICATORS = {
    STORED: 0.01,
    "read_bytes_per_token": 0.01,
    "operations_per_token": 0.01,
    PEAK: 0.02,
    SECONDS: 0.02,
}


@dataclass(frozen=True)
class Measure:
    """One metric of one task. ``main`` is the task's first, ``quality`` says that it is about what the model writes and
    not what that costs, ``lengths`` are the prompts' tokens by which it can be shown."""

    id: str
    task: str
    metric: str
    unit: str
    better: Literal["higher", "lower"]
    summary: str
    quality: bool
    main: bool
    lengths: list[int]

    def at_least_as_good(self, one: float, other: float) -> bool:
        return one >= other if self.better == "higher" else one <= other


@dataclass(frozen=True)
class Row:
    """One configuration. ``values`` by measure; ``groups`` by measure, group and the group's value; ``against`` has
    differences from other configurations on the same samples (this one's less theirs), by their key and by measure.
    ``indicators`` are the costs of :data:`INDICATORS`. A row that is not ``finished`` has no memory and is on no front.
    """

    number: int
    key: str
    vary: dict[str, Any]
    samples: int
    finished: bool
    budget_bytes: int | None
    predicted_bytes: int | None
    accounts: dict[str, dict[str, int]]
    indicators: dict[str, float]
    values: dict[str, Estimate]
    groups: dict[str, dict[str, dict[str, Estimate]]]
    against: dict[str, dict[str, Estimate]]

    @property
    def kind(self) -> str:
        """``exact``, the seam that it varies, ``both`` or ``other``."""
        if self.key == EXACT:
            return EXACT
        seams = [seam for seam in SEAMS if seam in self.vary]
        return "both" if len(seams) == 2 else seams[0] if seams else "other"

    def value(self, measure: Measure, tokens: int | None = None) -> Estimate | None:
        """Over all samples, or those of one length."""
        if tokens is None:
            return self.values.get(measure.id)
        by_length = (self.groups.get(measure.id, {}).get(group, {}).get(str(tokens)) for group in LENGTHS)
        return next(filter(None, by_length), None)


@dataclass(frozen=True)
class Front:
    """The configurations that no other one equals in both and beats in one: a measure of quality (of prompts of
    ``tokens``, None for all) and a ``cost``. By their measured values: neighbours may be within noise."""

    measure: str
    tokens: int | None
    cost: str
    members: list[str]


@dataclass(frozen=True)
class Flip:
    """Two configurations that two indicators order differently: ``one`` is smaller by ``indicator``, of which the
    ``other`` has ``ratio`` times as much, and larger by ``contradicted_by``, of which it has ``contradicting_ratio``
    times as much. Both differences are larger than noise (:data:`INDICATORS`)."""

    one: str
    other: str
    indicator: str
    contradicted_by: str
    ratio: float
    contradicting_ratio: float

    @property
    def size(self) -> float:
        return min(math.log(self.ratio), math.log(self.contradicting_ratio))


@dataclass(frozen=True)
class Report:
    """All there is to show. ``rows`` are in the order of their peaks, unfinished ones last, and numbered so; ``speed``
    is the measure of seconds for each token, where one was taken."""

    experiment: Experiment
    measures: list[Measure]
    speed: str | None
    rows: list[Row]
    fronts: list[Front]
    flips: list[Flip]
    refused: list[Refused]

    @cached_property
    def quality(self) -> list[Measure]:
        """The first measure of each task that is about quality."""
        return [measure for measure in self.measures if measure.quality and measure.main]

    @cached_property
    def by_key(self) -> dict[str, Row]:
        return {row.key: row for row in self.rows}

    @cached_property
    def _members(self) -> set[tuple[str, int | None, str, str]]:
        return {(front.measure, front.tokens, front.cost, key) for front in self.fronts for key in front.members}

    def within_noise(self, cost: str) -> bool:
        """Whether no two configurations differ in a cost by more than noise, so that a front against it is chance."""
        values = [row.indicators[cost] for row in self.rows if row.finished and cost in row.indicators]
        return len(values) > 1 and max(values) <= min(values) * (1 + INDICATORS[cost])

    def on_front(self, row: Row, measure: Measure, cost: str, tokens: int | None = None) -> bool:
        return (measure.id, tokens, cost, row.key) in self._members

    def cost(self, row: Row, cost: str, tokens: int | None = None) -> Estimate | None:
        """What a row costs, as an estimate. Seconds are those after prompts of the nearest length that was measured, or
        the longest."""
        if cost == SECONDS:
            return _seconds(row, next((each for each in self.measures if each.id == self.speed), None), tokens)
        value = row.indicators.get(cost)
        return None if value is None else Estimate(value, None, None, 1)

    def flips_of(self, row: Row, indicator: str) -> list[Flip]:
        """Those in which an indicator of a row contradicts another one, the worst first."""
        return [
            flip
            for flip in self.flips
            if row.key in (flip.one, flip.other) and indicator in (flip.indicator, flip.contradicted_by)
        ]

    def as_json(self) -> dict[str, Any]:
        """Stable keys, as docs/commands.md has them."""
        return {
            "experiment": asdict(self.experiment),
            "measures": [asdict(measure) for measure in self.measures],
            "speed": self.speed,
            "configurations": [asdict(row) for row in self.rows],
            "fronts": [asdict(front) for front in self.fronts],
            "flips": [asdict(flip) for flip in self.flips],
            "refused": [asdict(each) for each in self.refused],
        }


def summarise(results: Results) -> Report:
    """Everything the report shows. Raises UsageError for tasks that this version does not know."""
    found = _Found(results)
    measures = found.measures()
    speed = next((each for each in measures if (found.tasks[each.task].name, each.metric) == SPEED), None)
    rows = [found.row(configuration, measures, speed) for configuration in results.experiment.configurations]
    rows = [row for row in rows if row.samples or row.finished]
    rows.sort(key=lambda row: (not row.finished, row.indicators.get(PEAK, 0)))
    rows = [replace(row, number=number) for number, row in enumerate(rows, start=1)]
    report = Report(
        results.experiment,
        measures,
        speed.id if speed else None,
        rows,
        fronts=[],
        flips=found.flips(rows, speed),
        refused=list(results.refused.values()),
    )
    return replace(report, fronts=_fronts(report))


@dataclass
class _Found:
    """The samples of a folder by configuration and task, in the order of the exact model's."""

    results: Results
    tasks: dict[str, Task] = field(default_factory=dict)
    samples: dict[tuple[str, str], dict[str, SampleResult]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tasks = {spec: parse_one("tasks", spec) for spec in self.results.experiment.tasks}
        for sample in self.results.samples.values():
            self.samples.setdefault((sample.configuration, sample.task), {})[sample.sample] = sample

    def measures(self) -> list[Measure]:
        found = []
        for spec, task in self.tasks.items():
            samples = (each for (_, of), of_task in self.samples.items() if of == spec for each in of_task.values())
            lengths = {int(each.group[name]) for each in samples for name in LENGTHS if name in each.group}
            for metric in task.metrics:
                quality, main = metric.unit not in COST_UNITS, metric is task.metrics[0]
                found.append(
                    Measure(
                        _id(spec, metric.name),
                        spec,
                        metric.name,
                        metric.unit,
                        metric.better,
                        metric.summary,
                        quality,
                        main,
                        sorted(lengths),
                    )
                )
        return found

    def row(self, configuration: Configuration, measures: list[Measure], speed: Measure | None) -> Row:
        key = configuration.key
        values: dict[str, Estimate] = {}
        groups: dict[str, dict[str, dict[str, Estimate]]] = {}
        for spec, task in self.tasks.items():
            samples = self.samples.get((key, spec), {}).values()
            values |= _estimates(spec, task, samples)
            for name, value in sorted({pair for sample in samples for pair in sample.group.items()}, key=str):
                part = [sample for sample in samples if sample.group.get(name) == value]
                for of, estimate in _estimates(spec, task, part).items():
                    groups.setdefault(of, {}).setdefault(name, {})[str(value)] = estimate
        end = self.results.ends.get(key)
        row = Row(
            number=0,
            key=key,
            vary=configuration.vary,
            samples=sum(len(self.samples.get((key, spec), {})) for spec in self.tasks),
            finished=end is not None,
            budget_bytes=end.budget_bytes if end else None,
            predicted_bytes=end.receipt["predicted_bytes"] if end else None,
            accounts=end.receipt["accounts"] if end else {},
            indicators={},
            values=values,
            groups=groups,
            against={other: self.compared(key, other) for other in self.baselines(configuration)},
        )
        if end is not None:
            stored = end.indicators["weights_bytes"] + end.indicators["kv_bytes"]
            row.indicators.update({**end.indicators, STORED: stored, PEAK: end.peak_rss_bytes})
        seconds = _seconds(row, speed)
        if seconds is not None:
            row.indicators[SECONDS] = seconds.value
        return row

    def baselines(self, configuration: Configuration) -> list[str]:
        """The exact model, and what differs from a configuration in that a seam has its baseline."""
        found = [] if configuration.key == EXACT else [EXACT]
        for seam in SEAMS:
            if seam in configuration.vary and configuration.vary[seam] != BASELINE:
                vary = {**configuration.vary, seam: BASELINE}
                found += [other.key for other in self.results.experiment.configurations if other.vary == vary]
        return found

    def compared(self, one: str, other: str) -> dict[str, Estimate]:
        """The differences of the measures of two configurations, on the samples that both have."""
        found: dict[str, Estimate] = {}
        for spec in self.tasks:
            found |= self._compared(one, other, spec, self.samples.get((one, spec), {}))
        return found

    def _compared(self, one: str, other: str, spec: str, names: Iterable[str]) -> dict[str, Estimate]:
        mine, theirs = self.samples.get((one, spec), {}), self.samples.get((other, spec), {})
        both = [name for name in names if name in mine and name in theirs]
        if not both:
            return {}
        values = [[each[name].values for name in both] for each in (mine, theirs)]
        return {_id(spec, metric): found for metric, found in self.tasks[spec].compare(*values).items()}

    def take_as_long(self, one: str, other: str, speed: Measure) -> bool:
        """Whether the seconds of two configurations, as :func:`_seconds` has them, may be the same."""
        samples = self.samples.get((one, speed.task), {}).values()
        longest = [each.sample for each in samples if speed.lengths[-1] in each.group.values()]
        return not separate(self._compared(one, other, speed.task, longest)[speed.id])

    def flips(self, rows: Sequence[Row], speed: Measure | None) -> list[Flip]:
        """The largest first."""
        found = []
        for one, other in permutations([row for row in rows if row.finished], 2):
            flipped = [(i, j) for i, j in combinations(INDICATORS, 2) if _more(i, other, one) and _more(j, one, other)]
            if any(SECONDS in pair for pair in flipped):
                assert speed is not None
                if self.take_as_long(one.key, other.key, speed):
                    flipped = [pair for pair in flipped if SECONDS not in pair]
            mine, theirs = one.indicators, other.indicators
            found += [Flip(one.key, other.key, i, j, theirs[i] / mine[i], mine[j] / theirs[j]) for i, j in flipped]
        return sorted(found, key=lambda flip: -flip.size)


def _more(indicator: str, one: Row, other: Row) -> bool:
    """Whether one has more of an indicator than another by so much that it counts."""
    a, b = (row.indicators.get(indicator) for row in (one, other))
    return a is not None and b is not None and a > b * (1 + INDICATORS[indicator])


def separate(difference: Estimate) -> bool:
    """Whether the interval of a difference leaves out zero."""
    return difference.low is not None and difference.high is not None and not difference.low <= 0 <= difference.high


def _id(spec: str, metric: str) -> str:
    return f"{spec}.{metric}"


def _estimates(spec: str, task: Task, samples: Iterable[SampleResult]) -> dict[str, Estimate]:
    values = [sample.values for sample in samples]
    return {_id(spec, metric): found for metric, found in task.summarise(values).items()} if values else {}


def _seconds(row: Row, speed: Measure | None, tokens: int | None = None) -> Estimate | None:
    """After prompts of the length nearest to ``tokens``, or the longest, of which the other indicators are too."""
    if speed is None or not speed.lengths:
        return None
    wanted = speed.lengths[-1] if tokens is None else tokens
    return row.value(speed, min(speed.lengths, key=lambda length: abs(length - wanted)))


def _fronts(report: Report) -> list[Front]:
    found = []
    for measure in report.measures:
        if not measure.quality:
            continue
        for tokens in (None, *measure.lengths):
            for cost in COSTS:
                points = []
                for row in report.rows:
                    value, price = row.value(measure, tokens), report.cost(row, cost, tokens)
                    if row.finished and value is not None and price is not None:
                        points.append((row.key, value.value, price.value))
                members = [
                    key
                    for key, value, price in points
                    if not any(
                        measure.at_least_as_good(other, value) and less <= price and (other, less) != (value, price)
                        for _, other, less in points
                    )
                ]
                if points:
                    found.append(Front(measure.id, tokens, cost, members))
    return found
