"""Python processes beside this one, for work whose memory must not count in the budget of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tightfit.errors import BudgetError, CheckpointError, TightfitError, UsageError

KINDS = {kind.__name__: kind for kind in (CheckpointError, UsageError)}

PROGRESS = "progress "  # what lines begin with that a child writes before its answer

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


def ask(
    target: str, question: dict[str, Any], progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """What the function ``target`` (``module:name``) answers to a JSON object in a process of its own; ``progress`` is
    called with what that tells :func:`report`.

    The errors that it raises for the user are raised here.
    """
    module, _, name = target.partition(":")
    code = f"from tightfit.child import answer; from {module} import {name} as asked; answer(asked)"
    line = ""
    with (
        tempfile.TemporaryFile("w+") as asked,  # may be longer than an argument can be
        tempfile.TemporaryFile("w+") as errors,
    ):
        json.dump(question, asked)
        asked.seek(0)
        with subprocess.Popen(
            command(code), env=environment(), stdin=asked, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if line.startswith(PROGRESS):
                        done, total = line.removeprefix(PROGRESS).split()
                        progress(int(done), int(total))
            except BaseException:  # Ctrl-C
                process.kill()
                raise
        errors.seek(0)
        told = errors.read().strip()
    try:
        found: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        raise TightfitError(f"{name} failed in a process of its own: {told}", "Please report this.") from None
    if found.get("kind") == BudgetError.__name__:
        raise BudgetError(found["error"], found["hint"], found["smallest_bytes"])
    if "error" in found:
        raise KINDS.get(found["kind"], TightfitError)(found["error"], found["hint"])
    return found


def report(done: int, total: int) -> None:
    """The child process: tells how far it has come."""
    print(f"{PROGRESS}{done} {total}", flush=True)


def answer(function: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The child process: a question as its input, the answer as its output."""
    try:
        found = function(json.load(sys.stdin))
    except TightfitError as error:
        smallest, kind = getattr(error, "smallest_bytes", None), type(error).__name__
        found = {"error": error.message, "hint": error.hint, "kind": kind, "smallest_bytes": smallest}
    print(json.dumps(found))
