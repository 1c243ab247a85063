"""What every command shares: options, errors, standard error, and JSON."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from tightfit.errors import TightfitError

INTERRUPTED = 130  # as a shell reports SIGINT

Json = Annotated[bool, typer.Option("--json", help="Print JSON with stable keys instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        "-m",
        metavar="SIZE",
        help="Budget for the whole process: 600MiB, 4GB, 50%. Default: what is available less a margin.",
    ),
]
Context = Annotated[int | None, typer.Option("--context", "-c", help="Tokens to keep of each sequence.")]
Batch = Annotated[int | None, typer.Option("--batch", "-b", help="Sequences at once.")]
Weights = Annotated[
    str | None,
    typer.Option("--weights", metavar="FORMAT", help="Format of the weights: bf16, int8, int4(group=64), ..."),
]
Chunk = Annotated[int | None, typer.Option("--chunk", help="Prompt tokens computed at once.")]
Threads = Annotated[int | None, typer.Option("--threads", "-t", help="Cores to use. Default: all that are allowed.")]


def guarded(app: typer.Typer, arguments: list[str]) -> int:
    """Runs the command line; gives the exit status. ``--debug`` anywhere shows tracebacks."""
    debug = "--debug" in arguments
    try:
        result = app(arguments, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except TightfitError as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, OutputClosedError):
            # Python would complain once more when it flushes what is left.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        elif "--json" in arguments:
            print_json(as_json(error))
        say(f"error: {error.message}")
        if error.hint:
            say(error.hint)
        return error.exit_status
    except (KeyboardInterrupt, typer.Abort):
        say("\ninterrupted")
        return INTERRUPTED
    except typer.Exit as exit:
        return exit.exit_code
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            show: Callable[[], None] | None = getattr(error, "show", None)
            if show is not None:
                show()
                return int(getattr(error, "exit_code", 2))
        if debug:
            traceback.print_exc()
        say(f"error: {type(error).__name__}: {error}")
        say("This is a mistake in tightfit. Please report it with what --debug prints.")
        return 70  # EX_SOFTWARE


def as_json(error: TightfitError) -> dict[str, Any]:
    """``{"error", "hint"}``, and ``smallest_bytes`` where it is known."""
    answer: dict[str, Any] = {"error": error.message, "hint": error.hint}
    if getattr(error, "smallest_bytes", None) is not None:
        answer["smallest_bytes"] = error.smallest_bytes  # type: ignore[attr-defined]
    return answer


def write(text: str, end: str = "\n") -> None:
    """Text on standard output, at once. Raises OutputClosedError if nobody reads it any more."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise OutputClosedError from None


class OutputClosedError(TightfitError):
    """Standard output was closed, as by ``| head``."""

    exit_status = 141  # as a shell reports SIGPIPE

    def __init__(self) -> None:
        super().__init__("standard output was closed before everything was written")


def say(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    write(json.dumps(value, indent=2))
