"""Errors that end a command: what was wrong, and what to do about it.

Every error a user can cause is a :class:`TightfitError`. The command line prints its two sentences and exits with
``exit_status``; ``--debug`` shows the traceback as well.
"""

from __future__ import annotations


class TightfitError(Exception):
    """Something the user can mend.

    ``message`` says what was asked and what was found; ``hint`` says what to type or change next.
    """

    exit_status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\n{hint}" if hint else message)
        self.message = message
        self.hint = hint


class UsageError(TightfitError):
    """An argument, a specification string or a prompt that cannot be used."""

    exit_status = 2


class CheckpointError(TightfitError):
    """A model folder or file that is missing, truncated, inconsistent or of an unknown kind."""

    exit_status = 3


class BudgetError(TightfitError):
    """The request does not fit. ``smallest_bytes`` is the smallest budget that would work, where one is known."""

    exit_status = 4

    def __init__(self, message: str, hint: str = "", smallest_bytes: int | None = None) -> None:
        super().__init__(message, hint)
        self.smallest_bytes = smallest_bytes


class FileError(TightfitError):
    """A file that cannot be written: a full disk, a folder of somebody else's."""

    exit_status = 74  # EX_IOERR of sysexits.h
