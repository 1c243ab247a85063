"""Progress bars, on standard error, for anything that takes over two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 2.0  # seconds before a bar appears


@contextmanager
def loading(title: str = "loading") -> Iterator[Callable[[int, int], None]]:
    """Gives ``progress(done, total)`` in bytes. Nothing is shown where standard error is not a terminal."""
    with _bar(title, of_bytes=True) as progress:
        yield progress


@contextmanager
def counting(title: str) -> Iterator[Callable[[int, int], None]]:
    """As :func:`loading`, in things that are counted."""
    with _bar(title, of_bytes=False) as progress:
        yield progress


@contextmanager
def _bar(title: str, of_bytes: bool) -> Iterator[Callable[[int, int], None]]:
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = (DownloadColumn(binary_units=True), TransferSpeedColumn()) if of_bytes else (MofNCompleteColumn(),)
    bar = Progress(
        TextColumn(title),
        BarColumn(),
        *amount,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(title, total=None)
    started = time.monotonic()
    shown = False

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if not shown and time.monotonic() - started > PATIENCE:
            bar.start()
            shown = True
        bar.update(task, completed=done, total=total)

    try:
        yield progress
    finally:
        if shown:
            bar.stop()
