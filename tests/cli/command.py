"""Runs the command line inside this process, which is many times faster than starting one."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tightfit.cli.app import app
from tightfit.cli.frame import guarded

USAGE, CHECKPOINT, BUDGET = 2, 3, 4  # exit statuses


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it wrote."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def tightfit(*arguments: str | Path | int | float, stdin: str | bytes = "") -> Result:
    """Runs ``tightfit`` with ``arguments``; ``stdin`` is what it reads, from a pipe."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    given = io.TextIOWrapper(io.BytesIO(stdin if isinstance(stdin, bytes) else stdin.encode()), "utf-8")
    with mock.patch.multiple(sys, stdin=given, stdout=out, stderr=err):
        status = guarded(app, [str(argument) for argument in arguments])
        texts = []
        for stream in (out, err):
            stream.flush()
            stream.seek(0)
            texts.append(stream.read())
    return Result(status, *texts)


def check(done: Result, status: int, *parts: str) -> None:
    """It ended with ``status``, one message of at most two lines that holds ``parts``, and no result."""
    assert done.status == status, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) == 2, "what and where, then what to do"
    for part in parts:
        assert part in done.stderr
