"""The process that measures one configuration: it opens the model as any run does, measures samples one by one, and
says at the end what it took.

It holds one sample at a time, and imports what measuring needs before it plans, so that this is part of what the plan
counts with.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tightfit.budget import malloc
from tightfit.catalog import parse_one
from tightfit.errors import TightfitError

PR_SET_PDEATHSIG = 1  # of prctl(2)
Answer = Callable[[dict[str, Any]], None]


def main() -> None:
    """Reads questions from standard input and answers each on standard output, JSON in one line each.

    - First ``{"wish", "tasks", "exact", "reference"}``: fields of a Wish, spec strings, whether this is the exact
      model, and where what that gives is kept. The answer is ``{}`` once the model is loaded.
    - ``{"task", "sample"}``: ``{"values", "seconds"}``.
    - Last ``{"longest": sample}``: ``{"peak_rss_bytes", "budget_bytes", "plan", "receipt", "indicators"}``, the latter
      of the token after that sample.

    An error of the user's is answered by ``{"kind", "error", "hint", "smallest_bytes"}``, and is the end.
    """
    malloc.tune_malloc()
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        _measure(answer)
    except TightfitError as error:
        smallest, kind = getattr(error, "smallest_bytes", None), type(error).__name__
        answer({"kind": kind, "error": error.message, "hint": error.hint, "smallest_bytes": smallest})


def _measure(answer: Answer) -> None:
    from tightfit.api import load_opened
    from tightfit.budget.meter import resident_set
    from tightfit.engine.opening import Wish, open_model
    from tightfit.lab.indicators import indicators
    from tightfit.lab.reader import Reader
    from tightfit.lab.reference import Stored
    from tightfit.lab.tasks.base import Sample

    asked = json.loads(sys.stdin.readline())
    tasks = {task: parse_one("tasks", task) for task in asked["tasks"]}
    wish, folder = Wish(**asked["wish"]), Path(asked["reference"])
    opened = open_model(wish)
    with opened.checkpoint, load_opened(wish, opened) as model:
        answer({})
        reader = Reader(model)
        for line in sys.stdin:
            question = json.loads(line)
            if "longest" in question:
                sample = Sample(**question["longest"])
                for _ in reader.follow(sample.prompt, sample.following or [0] * sample.new_tokens):
                    pass
                receipt = model.receipt()
                answer(
                    {
                        "peak_rss_bytes": resident_set().peak,
                        "budget_bytes": model.plan.budget,
                        "plan": model.plan.model_dump(),
                        "receipt": receipt,
                        "indicators": indicators(reader, opened.spec),
                    }
                )
                return
            task, sample = tasks[question["task"]], Sample(**question["sample"])
            stored = None
            if task.needs_reference:
                stored = Stored.of(folder, question["task"], sample, opened.spec.vocab_size)
                if asked["exact"]:
                    new = reader.greedy(sample.prompt, sample.new_tokens) if sample.new_tokens else []
                    stored.keep(reader.follow(sample.prompt, sample.following) if sample.following else (), new)
            began = time.perf_counter()
            values = task.measure(reader, sample, stored)
            answer({"values": values, "seconds": time.perf_counter() - began})


def _end_with_parent() -> None:
    """A parent that is killed takes us with it, where the system can do that (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
