"""``tightfit techniques``: what there is, by seam."""

from __future__ import annotations

from dataclasses import MISSING
from typing import Annotated

import typer

from tightfit.catalog import Technique, all_techniques
from tightfit.cli.options import Debug, Json
from tightfit.cli.output import print_json
from tightfit.errors import UsageError


def techniques(
    seam: Annotated[
        str | None, typer.Option("--seam", "-s", metavar="NAME", help="Only those of one seam, such as weights.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the techniques that there are.

    Each with its name, as options and plans take it, and whether it changes results.
    """
    known = all_techniques()
    seams = sorted({entry.seam for entry in known})
    if seam is not None and seam not in seams:
        raise UsageError(f"there is no seam '{seam}'", f"Seams: {', '.join(seams)}.")
    chosen = [entry for entry in known if seam in (None, entry.seam)]
    if json:
        print_json({"techniques": [as_json(entry) for entry in chosen]})
        return
    from tightfit.cli.screen import show, table

    listed = table("seam", "name", "", "what it does", "paper", numbers=False)
    for entry in chosen:
        listed.add_row(entry.seam, entry.name, "exact" if entry.exact else "lossy", entry.summary, entry.paper)
    show(listed)


def as_json(entry: Technique) -> dict[str, object]:
    """``settings`` are the defaults; null stands for a setting that must be given."""
    return {
        "seam": entry.seam,
        "name": entry.name,
        "summary": entry.summary,
        "paper": entry.paper,
        "exact": entry.exact,
        "settings": {name: None if default is MISSING else default for name, default in entry.settings.items()},
    }
