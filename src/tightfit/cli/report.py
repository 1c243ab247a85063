"""``tightfit lab report``: what an experiment found, as a page and as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tightfit.cli.options import Debug, Json
from tightfit.cli.output import print_json, say
from tightfit.errors import FileError

if TYPE_CHECKING:
    from rich.table import Table

    from tightfit.lab.report import Measure, Report, Row

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Results of `tightfit lab run`.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="The page. Default: report.html in the folder; none with --json."),
]


def report(folder: Folder, out: Out = None, json: Json = False, debug: Debug = False) -> None:
    """Show what an experiment found.

    A table here, and a page with plots that opens in any browser, without a network.
    """
    from tightfit.lab.report import summarise
    from tightfit.lab.results import Results

    found = summarise(Results.open(folder))
    html = None
    if json:
        if out is not None:
            html = _page(found)
        print_json(found.as_json())
    else:
        _show(found)
        html = _page(found)
        out = out or folder / "report.html"
    if html is not None and out is not None:
        try:
            out.write_text(html, encoding="utf-8")
        except OSError as error:
            raise FileError(f"{out} cannot be written: {error.strerror}", "Name another with --out.") from error
        say(f"the page is {out}")


def _page(found: Report) -> str:
    from tightfit.lab.page import page

    return page(found)


def _show(found: Report) -> None:
    from tightfit.cli.screen import show
    from tightfit.lab.page import title
    from tightfit.lab.report import PEAK

    lines = []
    if found.quality:
        lines.append("M, B, T: on the Pareto front against peak memory, bytes of weights and kv, time for a token")
    if found.within_noise(PEAK):
        lines.append("all peaks are within noise of each other: who has an M is chance")
    lines += [f"{row.key} was not measured to its end" for row in found.rows if not row.finished]
    lines += [f"{each.configuration} was refused: {each.error}" for each in found.refused]
    show(_table(found, [(measure, title(measure, found)) for measure in found.quality]), *lines)


def _table(found: Report, measures: list[tuple[Measure, str]]) -> Table:
    """All configurations in the order of their peaks, with the first measure of each task."""
    from tightfit.cli.screen import table
    from tightfit.lab.report import PEAK, SECONDS, STORED
    from tightfit.lab.shown import number

    costs = {PEAK: ("peak", "bytes"), STORED: ("weights+kv", "bytes"), SECONDS: ("token", "s")}
    made = table("configuration", *(head for head, _ in costs.values()), *(head for _, head in measures))
    for row in found.rows:
        shown = (
            number(row.indicators[cost], unit) if cost in row.indicators else "" for cost, (_, unit) in costs.items()
        )
        made.add_row(row.key, *shown, *(_value(found, row, measure) for measure, _ in measures))
    return made


def _value(found: Report, row: Row, measure: Measure) -> str:
    """With its interval, and marks of the fronts that it is on."""
    from tightfit.lab.report import MARKS
    from tightfit.lab.shown import interval, number

    estimate = row.value(measure)
    if estimate is None:
        return ""
    between = interval(estimate.low, estimate.high, measure.unit)
    text = number(estimate.value, measure.unit) + (f" ({between})" if between else "")
    marks = (mark if found.on_front(row, measure, cost) else " " for cost, mark in MARKS.items())
    return f"{text} {''.join(marks)}"
