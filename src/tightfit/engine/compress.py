"""Compressing a model inside a budget: what that takes, and doing it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tightfit import child
from tightfit.budget.machine import usable_cores
from tightfit.budget.meter import resident_set
from tightfit.budget.units import format_bytes
from tightfit.catalog import parse_one, spec_string
from tightfit.engine.opening import CHILD_BELOW, Opened, Wish, open_model
from tightfit.errors import BudgetError, CheckpointError, UsageError
from tightfit.plan.schema import OWN

MARGIN = 8 << 20  # small temporaries, and by how much the resident set of equal processes differs
PEAK_MARGIN = 1 << 20  # what importing may still add to a peak that it has already reached


def compress(
    wish: Wish,
    opened: Opened,
    weights: str | None,
    out: Path,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Writes the model in the format ``weights`` to the folder ``out``, with the memory and the threads that ``wish``
    names; gives a receipt, JSON-ready. ``own``, which None means for quantised GGUF files, keeps weights as they are.

    Raises BudgetError with the smallest budget that works, FileError where the folder cannot be written, UsageError
    where there is something that ``force`` does not replace.
    """
    if weights is None:
        weights = _own(opened)
    elif weights != OWN:
        weights = spec_string(parse_one("weights", weights))  # as it is kept: settings at their default are left out
    if opened.checkpoint.compressed is not None:
        raise CheckpointError(
            f"{opened.checkpoint.name} is compressed already, with {opened.checkpoint.compressed.weights}",
            f"Compress the model that it was made from: {opened.checkpoint.compressed.source}.",
        )
    if opened.budget < CHILD_BELOW and "torch" not in sys.modules:
        # Importing torch to find out what is needed would take more than the budget.
        _check(opened, _needed_by_child(wish, weights))
    needed = needed_bytes(wish, opened, weights)
    _check(opened, needed)

    import torch

    from tightfit.budget.ledger import Arena
    from tightfit.weights import store

    torch.set_num_threads(1)  # every thread that fills converts blocks of its own
    layout = store.layout(opened.checkpoint, opened.spec, weights)
    total, done = sum(group.nbytes for group in layout), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    started = time.monotonic()
    largest = max(group.nbytes for group in layout)
    memory = Arena(largest).take(largest)
    store.write(opened.checkpoint, weights, layout, memory, out, _threads(wish), force, count)
    return {
        "folder": str(out),
        "weights": weights,
        "bytes": total,
        "bits_per_weight": 8 * total / opened.spec.parameter_count,
        "seconds": time.monotonic() - started,
        "budget_bytes": opened.budget,
        "peak_rss_bytes": resident_set().peak,
        "predicted_bytes": needed,
    }


def _own(opened: Opened) -> str:
    """``own``, for a model in quantised types. Raises UsageError for others."""
    if opened.checkpoint.compressed is None and not opened.checkpoint.holds_blocks:
        raise UsageError(
            f"{opened.checkpoint.name} is not a quantised GGUF file, and no format was named",
            "Name one with --weights: int4, int8, int4(group=64), ...; own keeps the numbers as they are.",
        )
    return OWN


def needed_bytes(wish: Wish, opened: Opened, weights: str, elsewhere: int = 0) -> int:
    """The smallest budget that works: the interpreter with torch, the largest group of parameters, and what converting
    takes. ``elsewhere`` is by how much the process that compresses is larger than this one."""
    from tightfit.budget.code import drop_code_pages
    from tightfit.weights import store
    from tightfit.weights.placement.fill import scratch_bytes
    from tightfit.weights.placement.places import check

    checkpoint, spec = opened.checkpoint, opened.spec
    check(checkpoint, spec)
    layout = store.layout(checkpoint, spec, weights)
    drop_code_pages()
    seen = resident_set()
    converting = max(group.nbytes for group in layout)
    converting += max(scratch_bytes(checkpoint, group, _threads(wish)) for group in layout)
    return max(seen.current + converting + MARGIN, seen.peak + PEAK_MARGIN) + elsewhere


def _threads(wish: Wish) -> int:
    return wish.threads or usable_cores()


def _check(opened: Opened, needed: int) -> None:
    if needed > opened.budget:
        size = format_bytes(needed, ceil=True)
        raise BudgetError(
            f"{opened.checkpoint.name} cannot be compressed inside {format_bytes(opened.budget)}",
            f"The smallest budget that works is {size}. Type --memory {size.replace(' ', '')}.",
            smallest_bytes=needed,
        )


def _needed_by_child(wish: Wish, weights: str) -> int:
    asked = {"wish": asdict(wish), "weights": weights, "resident_bytes": resident_set().current}
    needed: int = child.ask("tightfit.engine.compress:needed_by_parent", asked)["needed"]
    return needed


def needed_by_parent(asked: dict[str, Any]) -> dict[str, Any]:
    """Tells in a process of its own how many bytes one that holds ``resident_bytes`` will need."""
    wish = Wish(**asked["wish"])
    opened = open_model(wish)
    return {"needed": needed_bytes(wish, opened, asked["weights"], asked["resident_bytes"] - resident_set().current)}
