"""The commands. Importing this does not import torch, so that ``--help`` comes at once."""

from __future__ import annotations

from typing import Annotated

import typer

from tightfit import __version__
from tightfit.cli import census, compress, doctor, fit, lab, plan, run, sensitivity, techniques
from tightfit.cli.options import Debug, Json
from tightfit.cli.output import print_json, say, write
from tightfit.errors import UsageError

app = typer.Typer(
    help="Run large language models inside a memory budget that you state.",
    add_completion=False,
    rich_markup_mode=None,  # help as plain text
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("plan")(plan.plan)
app.command("compress")(compress.compress)
app.command("census")(census.census)
app.command("fit")(fit.fit)
app.command("sensitivity")(sensitivity.sensitivity)


@app.command("doctor")
def run_doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure again, even if this machine was measured before.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what this machine has, and how fast it is.

    Also which kernels run on it. Memory, disk and kernels are measured the first time, which takes about half a minute;
    that is remembered.
    """
    from tightfit.cli.progress import counting

    report = None if measure else doctor.collect(measure=False)
    if report is None or not report["bandwidth"] or None in (report["runtime"], report["speeds"]):
        with counting("measuring") as progress:
            report = doctor.collect(measure=True, progress=progress)
    if json:
        print_json(report)
    else:
        from tightfit.cli.screen import show

        show(doctor.render(report), markup=True)


app.command("techniques")(techniques.techniques)
app.add_typer(lab.app, name="lab")


def _version(wanted: bool) -> None:
    if wanted:
        write(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        say(context.get_help())
        raise typer.Exit(UsageError.exit_status)
