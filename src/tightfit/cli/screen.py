"""Text and tables for people, drawn by rich."""

from __future__ import annotations

import io
import re
import sys
from typing import TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from tightfit.cli.output import say, write

WIDE = 1000  # columns where nobody's terminal sets a limit: every row of a table is one line


def show(*renderables: RenderableType, markup: bool = False) -> None:
    """Tables and lines for people on standard output. Plain strings are taken as they are, unless ``markup``."""
    write(_rendered(renderables, sys.stdout, markup), end="")


def show_aside(*renderables: RenderableType) -> None:
    """The same on standard error."""
    say(_rendered(renderables, sys.stderr, False), end="")


def table(*columns: str, numbers: bool = True) -> Table:
    """An empty table whose first column is text, and whose others are ``numbers`` or text too. Nothing is cut off."""
    made = Table(box=box.SIMPLE, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if numbers and index else "left", overflow="fold")
    return made


def _rendered(renderables: tuple[RenderableType, ...], stream: TextIO, markup: bool) -> str:
    """What rich would print on ``stream``; it is printed by us, so that there is one way for errors."""
    terminal, encoding = stream.isatty(), stream.encoding or "utf-8"  # rich draws lines that the encoding has
    width = None if terminal else WIDE
    file = io.TextIOWrapper(io.BytesIO(), encoding, errors="replace", newline="\n", write_through=True)
    console = Console(file=file, width=width, force_terminal=terminal, markup=markup, emoji=False, highlight=False)
    for renderable in renderables:
        console.print(renderable, soft_wrap=isinstance(renderable, str))
    file.seek(0)
    return re.sub(r" +$", "", file.read(), flags=re.MULTILINE)  # tables are padded to their width
