"""Entry point of the ``tightfit`` command. Imports nothing before Ctrl-C is taken care of."""

from __future__ import annotations

import io
import os
import signal
import sys


def main() -> None:
    """Runs the command line of this process and ends it."""
    try:
        _prepare()
        from tightfit.cli.app import app
        from tightfit.cli.frame import guarded

        # The frame around the command has its own handler; after it, an interrupt ends the process without more ado.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(guarded(app, sys.argv[1:]))


def _prepare() -> None:
    from tightfit.budget import malloc

    malloc.tune_malloc()  # first thing in the process
    if getattr(sys, "stderr", None) is None:  # closed: there is nobody to tell
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal has no letter for is shown as "?"
            stream.reconfigure(errors="replace")
