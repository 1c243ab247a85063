"""Where prompts come from: options, a file, standard input. All of it is UTF-8 text of bounded size."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tightfit.budget.units import format_bytes
from tightfit.cli.output import say
from tightfit.errors import UsageError

STANDARD_INPUT = "-"
MOST_BYTES = 16 << 20  # beyond the context of any model; it is read before anything is known of the model


def read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    """The prompts, from whichever place was named; ``-`` is standard input. Raises UsageError."""
    if prompts and file is not None:
        raise UsageError("both -p and --file give a prompt", "Leave one out.")
    if file is not None and str(file) != STANDARD_INPUT:
        return [_read_file(file)]
    if prompts.count(STANDARD_INPUT) > 1:
        raise UsageError("standard input can be read once, and '-p -' was given twice", "Leave one out.")
    return [_read_stdin() if prompt == STANDARD_INPUT else prompt for prompt in prompts or [STANDARD_INPUT]]


def lines() -> Iterator[str]:
    """The lines of standard input as they come, each without its end; a terminal is asked for them."""
    stream = _stdin()
    terminal = stream.isatty()
    while True:
        if terminal:
            say("> ", end="")
        line = stream.readline(MOST_BYTES + 1)
        if not line:
            if terminal:
                say("")
            return
        yield _text(line, "the line").rstrip("\n")


def _read_file(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return _text(stream.read(MOST_BYTES + 1), str(file))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}", "Name a text file.") from None


def _read_stdin() -> str:
    stream = _stdin()
    if stream.isatty():
        say("Type the prompt, then Ctrl-D:")
    try:
        text = _text(stream.read(MOST_BYTES + 1), "standard input")
    except OSError as error:
        raise UsageError(f"standard input cannot be read: {error.strerror}", "Give a prompt with -p.") from None
    if not text:
        raise UsageError("the prompt is empty", "Give one with -p TEXT, --file FILE or on standard input.")
    return text


def _stdin() -> BinaryIO:
    if getattr(sys, "stdin", None) is None:
        raise UsageError("standard input is closed", "Give a prompt with -p TEXT or --file FILE.")
    return sys.stdin.buffer


def _text(content: bytes, where: str) -> str:
    if len(content) > MOST_BYTES:
        raise UsageError(
            f"{where} is longer than {format_bytes(MOST_BYTES)}, beyond the context of any model",
            "Give a part of it.",
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}",
            "Convert it first, for example: iconv -f ISO-8859-1 -t UTF-8 FILE",
        ) from None
    return text.replace("\r\n", "\n")
