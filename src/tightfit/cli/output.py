"""Results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import Any

from tightfit.errors import TightfitError


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


def say(text: str, end: str = "\n") -> None:
    """One line on standard error; nothing, if nobody reads it."""
    with suppress(OSError):
        print(text, end=end, file=sys.stderr, flush=True)
