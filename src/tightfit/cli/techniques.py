"""``tightfit techniques``: what there is, by seam."""

from __future__ import annotations

from typing import Annotated

import typer

from tightfit.catalog import Technique, all_techniques
from tightfit.cli.frame import Debug, Json, print_json
from tightfit.errors import UsageError


def techniques(
    seam: Annotated[str | None, typer.Option("--seam", "-s", help="Only this seam: weights, ...")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Lists every technique: its name, what it does, and whether it changes results."""
    known = all_techniques()
    seams = sorted({entry.seam for entry in known})
    if seam is not None and seam not in seams:
        raise UsageError(f"there is no seam '{seam}'", f"Seams: {', '.join(seams)}.")
    chosen = [entry for entry in known if seam in (None, entry.seam)]
    if json:
        print_json([as_json(entry) for entry in chosen])
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("seam", "name", "", "what it does", "paper"):
        table.add_column(column)
    for entry in chosen:
        table.add_row(entry.seam, entry.name, "exact" if entry.exact else "lossy", entry.summary, entry.paper)
    Console(highlight=False).print(table)


def as_json(entry: Technique) -> dict[str, object]:
    return {
        "seam": entry.seam,
        "name": entry.name,
        "summary": entry.summary,
        "paper": entry.paper,
        "exact": entry.exact,
        "settings": {name: repr(default) for name, default in entry.settings.items()},
    }
