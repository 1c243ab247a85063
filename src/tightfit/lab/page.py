"""The report as one HTML page that opens without a network: everything is inside. Without scripts it only loses that
tables can be sorted and plots chosen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from tightfit.budget.units import MiB, format_bytes
from tightfit.lab.plots import Axis, Point, require_matplotlib, tradeoff
from tightfit.lab.report import (
    BASELINE,
    COSTS,
    INDICATORS,
    MARKS,
    PEAK,
    SECONDS,
    STORED,
    Flip,
    Measure,
    Report,
    Row,
    separate,
)
from tightfit.lab.shown import interval, number
from tightfit.lab.statistics import Estimate

TEMPLATE = Path(__file__).with_name("page.html")
MOST_FLIPS = 15  # that are listed; all of them are in --json
TITLES = {
    PEAK: "peak memory",
    STORED: "weights and cache",
    SECONDS: "time for a token",
    "read_bytes_per_token": "read for a token",
    "operations_per_token": "operations for a token",
}
UNITS = dict.fromkeys(INDICATORS, "bytes") | {SECONDS: "s", "operations_per_token": "operations"}
KINDS = {
    "exact": "the exact model",
    "weights": "weights",
    "kv": "keys and values",
    "both": "weights, keys and values",
    "other": "anything else",
}


@dataclass(frozen=True)
class Cell:
    """``text`` with its ``interval`` below, ``order`` to sort by (None comes last), and ``marks`` (text, title);
    ``dot`` is the color of one before it, ``kind`` of a difference ``gain``, ``loss`` or ``noise``, and ``shade`` how
    dark the ground is, from 0 to 1."""

    text: str
    order: float | str | None
    interval: str = ""
    marks: Sequence[tuple[str, str]] = ()
    dot: str = ""
    kind: str = ""
    shade: float | None = None


def page(report: Report) -> str:
    """The whole page. Raises UsageError where matplotlib is missing."""
    require_matplotlib()
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = _breakable
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        experiment=report.experiment,
        kinds=[(kind, title) for kind, title in KINDS.items() if any(row.kind == kind for row in report.rows)],
        views=list(_views(report)),
        overview=_overview(report),
        differences=_differences(report),
        tasks=list(_tasks(report)),
        memory=_memory(report),
        flips=[_flip(report, flip) for flip in _largest(report)],
        ranks=_ranks(report),
        thresholds={TITLES[name]: f"{share:.0%}" for name, share in INDICATORS.items()},
        format_bytes=format_bytes,
        baseline=BASELINE,
    )


def _breakable(text: str) -> Markup:
    """Escaped, with places where a line may break between the parts of a name."""
    return Markup(re.sub(r"(?<=[=(,+])(?=.)", "<wbr>", str(escape(text))))


def title(measure: Measure, report: Report) -> str:
    """For people: ``lookup: correct``, with settings of the task where there is another of its name."""
    name, _, _ = measure.task.partition("(")
    same = [spec for spec in report.experiment.tasks if spec.partition("(")[0] == name]
    return f"{name if len(same) == 1 else measure.task}: {measure.metric.replace('_', ' ')}"


def _name(row: Row) -> Cell:
    return Cell(row.key, row.key, marks=() if row.finished else (("unfinished", "it was not measured to its end"),))


def _measured(estimate: Estimate | None, unit: str, marks: Sequence[tuple[str, str]] = ()) -> Cell:
    if estimate is None:
        return Cell("", None)
    return Cell(number(estimate.value, unit), estimate.value, interval(estimate.low, estimate.high, unit), marks)


def _overview(report: Report) -> tuple[list[str], list[list[Cell]]]:
    """The table of all configurations: costs, and the first measure of each task."""
    heads = [
        "#",
        "configuration",
        *(TITLES[name] for name in INDICATORS),
        *(title(each, report) for each in report.quality),
    ]
    rows = []
    for row in report.rows:
        cells = [Cell(str(row.number), row.number, dot=row.kind), _name(row)]
        for name in INDICATORS:
            cost = report.cost(row, name)
            flips = report.flips_of(row, name)
            marks = [(f"⇅{len(flips)}", _sentence(report, flip)) for flip in flips[:1]]
            cells.append(_measured(cost, UNITS[name], marks))
        for measure in report.quality:
            on = [cost for cost in COSTS if report.on_front(row, measure, cost)]
            marks = [(MARKS[cost], f"on the front of {title(measure, report)} against {TITLES[cost]}") for cost in on]
            cells.append(_measured(row.value(measure), measure.unit, marks))
        rows.append(cells)
    return heads, rows


def _differences(report: Report) -> tuple[list[str], list[list[Cell]]]:
    """Each configuration against the exact model and its baselines, on the same samples."""
    heads = ["#", "configuration", "against", "bytes", *(title(each, report) for each in report.quality)]
    rows = []
    for row in report.rows:
        for key, differences in row.against.items():
            other = report.by_key.get(key)
            if other is None or not differences:
                continue
            ratio = Cell("", None)
            if row.finished and other.finished:
                share = row.indicators[STORED] / other.indicators[STORED]
                ratio = Cell(f"{share:.0%}", share)
            cells = [Cell(str(row.number), row.number, dot=row.kind), _name(row), Cell(key, key), ratio]
            for measure in report.quality:
                cells.append(_difference(differences.get(measure.id), measure))
            rows.append(cells)
    return heads, rows


def _difference(estimate: Estimate | None, measure: Measure) -> Cell:
    if estimate is None:
        return Cell("", None)
    better = measure.at_least_as_good(estimate.value, 0)
    kind = "noise" if not separate(estimate) else "gain" if better else "loss"
    sign = "+" if estimate.value > 0 else ""
    return Cell(
        sign + number(estimate.value, measure.unit),
        estimate.value,
        interval(estimate.low, estimate.high, measure.unit),
        kind=kind,
    )


def _tasks(report: Report) -> Iterator[dict[str, Any]]:
    """Of each task all metrics, and the first one by every group of samples."""
    for spec in report.experiment.tasks:
        measures = [measure for measure in report.measures if measure.task == spec]
        main = measures[0]
        parts = sorted(
            {(name, value) for row in report.rows for name, of in row.groups.get(main.id, {}).items() for value in of},
            key=lambda pair: (pair[0], float(pair[1]) if _is_number(pair[1]) else 0, pair[1]),
        )
        heads = ["#", "configuration", *(measure.metric.replace("_", " ") for measure in measures)]
        heads += [f"{main.metric.replace('_', ' ')}, {name} {value}" for name, value in parts]
        rows = []
        for row in report.rows:
            cells = [Cell(str(row.number), row.number, dot=row.kind), _name(row)]
            cells += [_measured(row.value(measure), measure.unit) for measure in measures]
            groups = row.groups.get(main.id, {})
            cells += [_measured(groups.get(name, {}).get(value), main.unit) for name, value in parts]
            rows.append(cells)
        samples = max((row.values[main.id].samples for row in report.rows if main.id in row.values), default=0)
        yield {"task": spec, "samples": samples, "heads": heads, "rows": rows}


def _is_number(text: str) -> bool:
    return text.lstrip("-").replace(".", "", 1).isdigit()


def _memory(report: Report) -> list[dict[str, Any]]:
    """Of each configuration its accounts as shares of the largest sum, and what the system saw."""
    rows = [row for row in report.rows if row.finished]
    held = {row.key: sum(account["peak_bytes"] for account in row.accounts.values()) for row in rows}
    widest = max([max(held[row.key], row.indicators[PEAK]) for row in rows], default=1)
    return [
        {
            "row": row,
            "parts": [
                (name, account["peak_bytes"], account["peak_bytes"] / widest) for name, account in row.accounts.items()
            ],
            "peak": row.indicators[PEAK] / widest,
        }
        for row in rows
    ]


def _flip(report: Report, flip: Flip) -> dict[str, str]:
    one, other = report.by_key[flip.one], report.by_key[flip.other]

    def both(indicator: str) -> str:
        a, b = (number(row.indicators[indicator], UNITS[indicator]) for row in (one, other))
        return f"{TITLES[indicator]}: {a} against {b}"

    return {
        "one": one.key,
        "other": other.key,
        "says": both(flip.indicator),
        "contradicts": both(flip.contradicted_by),
    }


def _largest(report: Report) -> list[Flip]:
    """The largest flip of each pair, of as many pairs as are listed."""
    pairs: dict[frozenset[str], Flip] = {}
    for flip in report.flips:
        pairs.setdefault(frozenset((flip.one, flip.other)), flip)
    return list(pairs.values())[:MOST_FLIPS]


def _ranks(report: Report) -> tuple[list[str], list[list[Cell]]]:
    """Which place each configuration has by each indicator, the smallest first."""
    rows = [row for row in report.rows if row.finished]
    names = [name for name in INDICATORS if all(name in row.indicators for row in rows)]
    ordered = {name: sorted(row.indicators[name] for row in rows) for name in names}
    ranked = []
    for row in sorted(rows, key=lambda row: row.indicators[STORED]):
        ranks = [ordered[name].index(row.indicators[name]) + 1 for name in names]
        shades = [Cell(str(rank), rank, shade=rank / len(rows)) for rank in ranks]
        ranked.append([Cell(str(row.number), row.number, dot=row.kind), _name(row), *shades])
    return ["#", "configuration", *(TITLES[name] for name in names)], ranked


def _sentence(report: Report, flip: Flip) -> str:
    told = _flip(report, flip)
    return f"{told['one']} against {told['other']}: {told['says']}, but {told['contradicts']}"


def _views(report: Report) -> Iterator[dict[str, Any]]:
    """Plots of each measure of quality against each cost, over all samples and by length."""
    for measure in report.measures:
        if not measure.quality:
            continue
        for tokens in (None, *(measure.lengths if measure.main and len(measure.lengths) > 1 else ())):
            plots = []
            for cost in COSTS:
                points = [
                    _point(report, row, measure, cost, tokens)
                    for row in report.rows
                    if row.finished and row.value(measure, tokens) and report.cost(row, cost, tokens)
                ]
                if not points:
                    continue
                name = f"{title(measure, report)} against {TITLES[cost]}, {_length(tokens)}"
                x, y = _axis(cost), Axis(title(measure, report) + _unit(measure.unit), measure.better)
                members = [row for row in report.rows if report.on_front(row, measure, cost, tokens)]
                noise = f"{INDICATORS[cost]:.0%}" if report.within_noise(cost) else ""
                plots.append(
                    {"svg": tradeoff(points, x, y, name), "cost": TITLES[cost], "members": members, "noise": noise}
                )
            if plots:
                yield {"measure": title(measure, report), "length": _length(tokens), "plots": plots}


def _length(tokens: int | None) -> str:
    return "all lengths" if tokens is None else f"{tokens} tokens"


def _unit(unit: str) -> str:
    return {"share": ", %", "": ""}.get(unit, f", {unit}")


def _axis(cost: str) -> Axis:
    return Axis(f"{TITLES[cost]}, {'ms' if cost == SECONDS else 'MiB'}")


def _point(report: Report, row: Row, measure: Measure, cost: str, tokens: int | None) -> Point:
    value, price = row.value(measure, tokens), report.cost(row, cost, tokens)
    assert value is not None
    assert price is not None
    unit = UNITS[cost]
    says = f"{row.number} {row.key}: {number(value.value, measure.unit)}, {number(price.value, unit)}"
    return Point(
        row.number,
        _scaled(price, 1000 if unit == "s" else 1 / MiB),
        _scaled(value, 100 if measure.unit == "share" else 1),
        report.on_front(row, measure, cost, tokens),
        row.kind,
        says,
    )


def _scaled(estimate: Estimate, factor: float) -> tuple[float, float, float]:
    low = estimate.value if estimate.low is None else estimate.low
    high = estimate.value if estimate.high is None else estimate.high
    return estimate.value * factor, low * factor, high * factor
