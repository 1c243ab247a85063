"""Python processes beside this one, for work whose memory must not count in the budget of this one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# The current folder may be that of a checkpoint, whose files are data: a json.py in it must not be imported. And Ctrl-C
# on a terminal reaches children too, who have nothing to add to what their parent says.
PRELUDE = """
import sys
sys.path = [entry for entry in sys.path if entry]
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
"""


def command(code: str, *arguments: str) -> list[str]:
    """The command that runs ``code`` with ``arguments`` in ``sys.argv[1:]``."""
    return [sys.executable, "-c", PRELUDE + code, *arguments]


def environment() -> dict[str, str]:
    """This process' environment, with this package where Python finds it."""
    folder = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}
