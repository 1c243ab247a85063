"""Results on standard output, everything else on standard error."""

from __future__ import annotations

import io
import json
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from tightfit.errors import TightfitError

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDE = 1000  # columns where nobody's terminal sets a limit: every row of a table is one line


class OutputError(TightfitError):
    """Standard output cannot be written."""

    exit_status = 74  # EX_IOERR of sysexits.h


class OutputClosedError(OutputError):
    """Standard output was closed, as by ``| head``."""

    exit_status = 141  # as a shell reports SIGPIPE

    def __init__(self) -> None:
        super().__init__("standard output was closed before everything was written")


def write(text: str, end: str = "\n") -> None:
    """Text on standard output, at once. Raises OutputError if it cannot be written."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise OutputClosedError from None
    except OSError as error:
        raise OutputError(
            f"standard output cannot be written: {error.strerror}", "Look at where it is redirected to."
        ) from None


def print_json(value: Any) -> None:
    """``value`` as JSON, in ASCII."""
    write(json.dumps(value, indent=2))


def show(*renderables: RenderableType, markup: bool = False) -> None:
    """Tables and lines for people on standard output. Plain strings are taken as they are, unless ``markup``."""
    write(_rendered(renderables, sys.stdout, markup), end="")


def show_aside(*renderables: RenderableType) -> None:
    """The same on standard error."""
    say(_rendered(renderables, sys.stderr, False), end="")


def say(text: str, end: str = "\n") -> None:
    """One line on standard error; nothing, if nobody reads it."""
    with suppress(OSError):
        print(text, end=end, file=sys.stderr, flush=True)


def _rendered(renderables: tuple[RenderableType, ...], stream: TextIO, markup: bool) -> str:
    """What rich would print on ``stream``; it is printed by us, so that there is one way for errors."""
    from rich.console import Console

    terminal, encoding = stream.isatty(), stream.encoding or "utf-8"  # rich draws lines that the encoding has
    width = None if terminal else WIDE
    file = io.TextIOWrapper(io.BytesIO(), encoding, errors="replace", newline="\n", write_through=True)
    console = Console(file=file, width=width, force_terminal=terminal, markup=markup, emoji=False, highlight=False)
    for renderable in renderables:
        console.print(renderable, soft_wrap=isinstance(renderable, str))
    file.seek(0)
    return "".join(f"{line.rstrip()}\n" for line in file.read().splitlines())  # tables are padded to their width
