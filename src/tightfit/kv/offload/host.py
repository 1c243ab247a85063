"""Cold pages in a file."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import ClassVar

from tightfit.budget.mounts import in_memory
from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.method import Method


@technique(
    seam="kv",
    name="host",
    paper="https://arxiv.org/abs/2303.06865",
    exact=True,
    summary="all but the latest pages lie in a file and are read when they are needed",
)
@dataclass(frozen=True)
class Host(Method):
    """Each head's last ``resident`` tokens are in memory, in whole pages, and the others in a file without a name in
    ``folder`` (default: the system's for temporary files), read with pread into scratch memory as they are needed
    (after FlexGen's offloading of the cache). With a selector only what is selected is read. Sums are made in another
    order; nothing else changes.
    """

    resident: int = 256
    folder: str = ""

    roles: ClassVar[tuple[str, ...]] = ("tier",)

    def __post_init__(self) -> None:
        if self.resident < 0:
            raise UsageError(f"host cannot keep {self.resident} tokens in memory", "Give resident=0 or more.")

    def open(self) -> int:
        """A new file's descriptor. Raises UsageError if the folder is in memory or cannot be written."""
        folder = self.folder or tempfile.gettempdir()
        if in_memory(folder):
            raise UsageError(
                f"{folder} lies in memory (tmpfs): pages there would count twice",
                "Name a folder on a disk: host(folder=...), or set TMPDIR.",
            )
        try:
            file, path = tempfile.mkstemp(prefix="tightfit-kv-", dir=folder)
        except OSError as error:
            raise UsageError(
                f"{folder} cannot hold a cache: {error.strerror}", "Name another: host(folder=...)."
            ) from None
        os.unlink(path)
        return file
