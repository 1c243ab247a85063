"""The frame around every command: whatever happens ends with one clear message and an exit status."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import typer

from tightfit.cli.output import OutputClosedError, OutputError, print_json, say, write
from tightfit.errors import TightfitError, UsageError

INTERRUPTED = 130  # as a shell reports SIGINT
MISTAKE = 70  # EX_SOFTWARE of sysexits.h
FILE_TROUBLE = 74  # EX_IOERR


def guarded(app: typer.Typer, arguments: list[str]) -> int:
    """Runs the command line; gives the exit status. ``--debug`` anywhere shows tracebacks."""
    with _interruptible():
        try:
            if getattr(sys, "stdout", None) is None:  # it was closed before Python started
                raise OutputClosedError
            status = app(arguments, standalone_mode=False, prog_name="tightfit")
            if status == INTERRUPTED:
                return _interrupted()
            write("", end="")  # what is buffered
            return status if isinstance(status, int) else 0
        except (KeyboardInterrupt, typer.Abort):
            return _interrupted()
        except SystemExit:  # typer's answer to a closed pipe
            return _report(OutputClosedError(), as_json=False)
        except Exception as error:
            if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # some code turns an interrupt into its own error
                return _interrupted()
            if "--debug" in arguments:
                traceback.print_exc()
            return _report(error, as_json="--json" in arguments)


def rearm() -> None:
    """After an interrupt that did not end the command, the next one raises KeyboardInterrupt again."""
    signal.signal(signal.SIGINT, _interrupt)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, and a second one ends the process at once, whatever it is doing.

    Where SIGINT is ignored, as for a job in the background, it stays so.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    rearm()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def _interrupted() -> int:
    say("\ninterrupted" if sys.stderr.isatty() else "interrupted")  # in a line after the terminal's ^C
    return INTERRUPTED


def _report(error: Exception, as_json: bool) -> int:
    """Says what went wrong; gives the exit status."""
    if isinstance(error, OutputError):
        # Python would complain once more when it flushes what is left.
        with suppress(OSError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        as_json = False
    explained, status = _explained(error)
    if as_json:
        with suppress(OutputError):
            print_json(described(explained))
    say(f"error: {explained.message}")
    if explained.hint:
        say(explained.hint)
    return status


def _explained(error: Exception) -> tuple[TightfitError, int]:
    """Any error as a message and a hint, and the exit status."""
    if isinstance(error, TightfitError):
        return error, error.exit_status
    formatted = getattr(error, "format_message", None)
    if formatted is not None:  # of the library that reads the command line
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "tightfit"
        return UsageError(_sentence(formatted()), f"See `{command} --help`."), UsageError.exit_status
    if isinstance(error, MemoryError):
        return TightfitError("memory ran out", "Name a smaller budget with --memory."), TightfitError.exit_status
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return TightfitError(f"{where}{error.strerror}", "Run it again with --debug to see where."), FILE_TROUBLE
    return TightfitError(
        f"{type(error).__name__}: {error}", "This is a mistake in tightfit: please report it with what --debug prints."
    ), MISTAKE


def _sentence(text: str) -> str:
    text = text.strip().removesuffix(".")
    return text[:1].lower() + text[1:]


def described(error: TightfitError) -> dict[str, Any]:
    """``{"error", "hint"}``, and ``smallest_bytes`` where it is known."""
    answer: dict[str, Any] = {"error": error.message, "hint": error.hint}
    smallest = getattr(error, "smallest_bytes", None)
    return answer if smallest is None else answer | {"smallest_bytes": smallest}
