"""Entry point of the ``tightfit`` command. Imports nothing before Ctrl-C is taken care of."""

from __future__ import annotations

import io
import os
import sys


def main() -> None:
    """Runs the command line of this process and ends it."""
    try:
        _prepare()
        from tightfit.cli.app import app
        from tightfit.cli.frame import guarded

        status = guarded(app, sys.argv[1:])
    except KeyboardInterrupt:  # before or after the frame around the command
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def _prepare() -> None:
    from tightfit.budget import malloc

    malloc.tune_malloc()  # first thing in the process
    if getattr(sys, "stderr", None) is None:  # closed: there is nobody to tell
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal has no letter for is shown as "?"
            stream.reconfigure(errors="replace")
