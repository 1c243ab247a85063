"""``tightfit techniques``: what there is, by seam, and what the lab found of it."""

from __future__ import annotations

import inspect
from dataclasses import MISSING
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tightfit.catalog import Technique, all_techniques, companions
from tightfit.cli.options import Debug, Json
from tightfit.cli.output import print_json
from tightfit.errors import UsageError
from tightfit.lab.figures import figures, of_technique, why_missing
from tightfit.lab.shown import interval, number

if TYPE_CHECKING:
    from rich.table import Table

ARXIV = "https://arxiv.org/abs/"
# The figures of a seam: their keys, heads in the list, names in an entry, and units.
SHOWN = {
    "weights": (
        ("bits_per_weight", "bits", "bits per weight", ""),
        ("kl", "KL", "KL divergence, nats", ""),
        ("lookups", "found", "look-ups right", "share"),
    ),
    "kv": (
        ("cache_share", "bytes", "bytes of the exact cache", "share"),
        ("kl", "KL", "KL divergence, nats", ""),
        ("lookups", "found", "look-ups right", "share"),
        ("speed_ratio", "speed", "tokens per second, times the exact cache's", ""),
    ),
}


def techniques(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show all of one technique: its settings, paper and figures.")
    ] = None,
    seam: Annotated[
        str | None, typer.Option("--seam", "-s", metavar="NAME", help="Only those of one seam, such as weights.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the techniques that there are.

    Each with its name, as options and plans take it, whether it changes results, and what the lab measured of it on the
    embedded model.
    """
    known = all_techniques()
    seams = list(dict.fromkeys(entry.seam for entry in known))
    if seam is not None and seam not in seams:
        raise UsageError(f"there is no seam '{seam}'", f"Seams: {', '.join(seams)}.")
    chosen = [entry for entry in known if seam in (None, entry.seam)]
    if name is not None:
        names = dict.fromkeys(entry.name for entry in chosen)
        chosen = [entry for entry in chosen if entry.name == name]
        if not chosen:
            raise UsageError(f"there is no technique '{name}'", f"Known ones: {', '.join(names)}.")
    if json:
        print_json({"techniques": [as_json(entry) for entry in chosen], "measured_on": measured_on()})
        return
    from tightfit.cli.screen import show

    if name is not None:
        for entry in chosen:
            show(f"{entry.name}: {entry.summary}", "", _entry(entry), "", f"{inspect.getdoc(entry.cls)}", "")
        return
    for each in seams:
        if listed := [entry for entry in chosen if entry.seam == each]:
            show(_list(each, listed))
    show(_measured(), "`tightfit techniques NAME` shows all of one: settings, what it composes with, intervals.")


def as_json(entry: Technique) -> dict[str, object]:
    """``settings`` are the defaults; null stands for a setting that must be given. ``figures`` are null where there are
    none, and ``not_measured`` says why."""
    return {
        "seam": entry.seam,
        "name": entry.name,
        "summary": entry.summary,
        "paper": entry.paper,
        "exact": entry.exact,
        "calibration": entry.calibration,
        "roles": _roles(entry),
        "composes_with": companions(entry),
        "settings": {name: None if default is MISSING else default for name, default in entry.settings.items()},
        "figures": of_technique(entry),
        "not_measured": why_missing(entry),
    }


def measured_on() -> dict[str, object]:
    """What figures were measured on and with, to be read beside them."""
    return {name: figures()[name] for name in ("model", "fingerprint", "context", "machine", "versions", "command")}


def _list(seam: str, entries: list[Technique]) -> Table:
    from tightfit.cli.screen import table

    shown = SHOWN.get(seam, ())
    listed = table(seam, "", "what it does", "arXiv", *(head for _, head, _, _ in shown))
    for column in listed.columns[:4]:
        column.justify = "left"
    for column in (*listed.columns[:2], *listed.columns[3:]):
        column.no_wrap = True
    for entry in entries:
        needs = f"; needs {entry.calibration}" if entry.calibration else ""
        found = of_technique(entry) or {}
        listed.add_row(
            entry.name,
            "exact" if entry.exact else "lossy",
            entry.summary + needs,
            entry.paper.removeprefix(ARXIV),
            *(_short(found[key]["value"], unit) if key in found else "" for key, _, _, unit in shown),
        )
    return listed


def _short(value: float, unit: str) -> str:
    return f"{value:.0%}" if unit == "share" else number(value, unit)


def _entry(entry: Technique) -> Table:
    """All of one technique, a line for each part."""
    from rich.table import Table

    lines = Table.grid(padding=(0, 2))
    settings = (
        name if default is MISSING else f"{name}={_written(default)}" for name, default in entry.settings.items()
    )
    parts = {
        "seam": entry.seam,
        "results": "as without it" if entry.exact else "change",
        "paper": entry.paper or "common practice",
        "settings": ", ".join(settings) or "none",
        "needs": entry.calibration or "nothing to be known of a model",
        "fills": ", ".join(_roles(entry)),
        "composes with": ", ".join(companions(entry)),
        **dict(_figures(entry)),
    }
    for name, text in parts.items():
        if text:
            lines.add_row(name, text)
    return lines


def _figures(entry: Technique) -> list[tuple[str, str]]:
    """What the lab found, with intervals; or why it found nothing."""
    found = of_technique(entry)
    if found is None:
        return [("not measured", why_missing(entry))]
    lines = [("", ""), ("on nano", f"as `{found['configuration']}`")]
    for key, _, name, unit in SHOWN[entry.seam]:
        if key in found:
            each = found[key]
            between = interval(each["low"], each["high"], unit)
            lines.append((name, number(each["value"], unit) + (f" ({between})" if between else "")))
    return lines


def _roles(entry: Technique) -> list[str]:
    """The roles that a method of the cache fills; where settings decide that, with their defaults."""
    roles = getattr(entry.cls, "roles", ())
    return list(entry.cls().roles if isinstance(roles, property) else roles)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _measured() -> str:
    made = figures()
    return (
        f"Measured by the lab on {made['model']}, the embedded model: KL divergence in nats, look-ups whose answer was "
        "found, bytes and speed of a cache as shares of the whole one's."
    )
