"""Progress bars, on standard error, for anything that takes over two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

PATIENCE = 2.0  # seconds before a bar appears


@contextmanager
def loading(title: str = "loading") -> Iterator[Callable[[int, int], None]]:
    """Gives ``progress(done, total)`` in bytes. Nothing is shown where standard error is not a terminal."""

    def columns() -> list[ProgressColumn]:
        from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

        return [DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()]

    with _bar(title, columns) as progress:
        yield progress


@contextmanager
def counting(title: str) -> Iterator[Callable[[int, int], None]]:
    """As :func:`loading`, in things that are counted."""

    def columns() -> list[ProgressColumn]:
        from rich.progress import MofNCompleteColumn, TimeRemainingColumn

        return [MofNCompleteColumn(), TimeRemainingColumn()]

    with _bar(title, columns) as progress:
        yield progress


@contextmanager
def foreseen(title: str) -> Iterator[Callable[[str, int, int, float | None], None]]:
    """As :func:`counting`, for things that take unlike times: ``progress(title, done, total, left)``, where ``left``
    seconds are foreseen for the rest, or None."""

    def columns() -> list[ProgressColumn]:
        from rich.progress import MofNCompleteColumn, TextColumn

        return [MofNCompleteColumn(), TextColumn("{task.fields[left]}")]

    with _bar(title, columns, left="") as progress:

        def show(title: str, done: int, total: int, left: float | None) -> None:
            shown = "" if left is None else f"{timedelta(seconds=round(left))} left"
            progress(done, total, description=title, left=shown)

        yield show


@contextmanager
def _bar(title: str, columns: Callable[[], list[ProgressColumn]], **fields: Any) -> Iterator[Callable[..., None]]:
    """Gives ``progress(done, total, **fields)``; ``columns`` come behind the title and the bar."""
    if not sys.stderr.isatty():
        yield lambda done, total, **fields: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *columns(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(title, total=None, **fields)
    started = time.monotonic()
    shown = False

    def progress(done: int, total: int, **fields: Any) -> None:
        nonlocal shown
        if not shown and time.monotonic() - started > PATIENCE:
            bar.start()
            shown = True
        bar.update(task, completed=done, total=total, **fields)

    try:
        yield progress
    finally:
        if shown:
            bar.stop()
