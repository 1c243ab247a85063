"""The ``tightfit`` command. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import sys

import typer

from tightfit import __version__
from tightfit.cli import doctor, plan, run, techniques
from tightfit.cli.frame import Debug, Json, print_json

app = typer.Typer(
    name="tightfit",
    help="Run large language models inside a memory budget that you state.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("plan")(plan.plan)
app.command("techniques")(techniques.techniques)


@app.command("doctor")
def run_doctor(
    measure: bool = typer.Option(False, "--measure", help="Measure again, even if this machine was measured before."),
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Says what this machine has, how fast its memory and disk are, and which kernels run on it."""
    report = doctor.collect(measure)
    if not measure and (not report["bandwidth"] or report["runtime"] is None):
        report = doctor.collect(measure=True)
    if json:
        print_json(report)
    else:
        from rich.console import Console

        Console(highlight=False).print(doctor.render(report))


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def main() -> None:
    """Entry point: errors that a user can mend end with their two sentences and an exit status, without a traceback."""
    from tightfit.budget import malloc

    malloc.tune_malloc()
    from tightfit.cli.frame import guarded

    sys.exit(guarded(app, sys.argv[1:]))
