"""``tightfit lab report``: what an experiment found, as a page and as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tightfit.cli.options import Debug, Json
from tightfit.cli.output import print_json, say
from tightfit.errors import FileError

if TYPE_CHECKING:
    from tightfit.lab.report import Measure, Report, Row

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Results of `tightfit lab run`.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        help="The page, or FILE.md for the table as Markdown. Default: report.html in the folder; nothing with --json.",
    ),
]


def report(folder: Folder, out: Out = None, json: Json = False, debug: Debug = False) -> None:
    """Show what an experiment found.

    A table here, and a page with plots that opens in any browser, without a network.
    """
    from tightfit.lab.report import summarise
    from tightfit.lab.results import Results

    found = summarise(Results.open(folder))
    if json:
        print_json(found.as_json())
    else:
        _show(found)
        out = out or folder / "report.html"
    if out is not None:
        written = _markdown(found) if out.suffix == ".md" else _page(found)
        try:
            out.write_text(written, encoding="utf-8")
        except OSError as error:
            raise FileError(f"{out} cannot be written: {error.strerror}", "Name another with --out.") from error
        say(f"the {'table' if out.suffix == '.md' else 'page'} is {out}")


def _page(found: Report) -> str:
    from tightfit.lab.page import page

    return page(found)


def _show(found: Report) -> None:
    from tightfit.cli.screen import show, table

    heads, rows = _table(found)
    made = table(*heads)
    for row in rows:
        made.add_row(*row)
    show(made, *_notes(found))


def _markdown(found: Report) -> str:
    """The same table, with what is needed to measure it again."""
    heads, rows = _table(found)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    lines += [[f"`{key}`", *(" ".join(cell.split()) for cell in cells)] for key, *cells in rows]
    experiment = found.experiment
    facts = [f"{name} {value}" for name, value in (experiment.machine | experiment.versions).items()]
    written = [
        f"# {experiment.model}: {len(rows)} configurations on {len(experiment.tasks)} tasks",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        *_notes(found),
        f"Tasks: {', '.join(experiment.tasks)}; context {experiment.context}, seed {experiment.seed}.",
        f"Machine: {', '.join(facts)}.",
        f"Command: `{experiment.command}`",
    ]
    return "\n\n".join(written) + "\n"


def _notes(found: Report) -> list[str]:
    """What the table does not say."""
    from tightfit.lab.report import PEAK

    lines = []
    if found.quality:
        lines.append("M, B, T: on the Pareto front against peak memory, bytes of weights and kv, time for a token")
    if found.within_noise(PEAK):
        lines.append("all peaks are within noise of each other: who has an M is chance")
    lines += [f"{row.key} was not measured to its end" for row in found.rows if not row.finished]
    lines += [f"{each.configuration} was refused: {each.error}" for each in found.refused]
    return lines


def _table(found: Report) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: all configurations in the order of their peaks, with the first measure of each task."""
    from tightfit.lab.page import title
    from tightfit.lab.report import PEAK, SECONDS, STORED
    from tightfit.lab.shown import number

    costs = {PEAK: ("peak", "bytes"), STORED: ("weights+kv", "bytes"), SECONDS: ("token", "s")}
    heads = ["configuration", *(head for head, _ in costs.values()), *(title(each, found) for each in found.quality)]
    rows = []
    for row in found.rows:
        shown = (
            number(row.indicators[cost], unit) if cost in row.indicators else "" for cost, (_, unit) in costs.items()
        )
        rows.append([row.key, *shown, *(_value(found, row, measure) for measure in found.quality)])
    return heads, rows


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
