"""What the exact model gave, in files of a results folder: rows of logits, and tokens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tightfit.errors import FileError

if TYPE_CHECKING:
    import torch

    from tightfit.lab.tasks.base import Sample


@dataclass(frozen=True)
class Stored:
    """What the exact model gave on a sample of a task, as :class:`~tightfit.lab.tasks.base.Reference` says: ``rows``
    of float32, one after the other, and ``new`` with the tokens as JSON. A row is read when it is asked for, and not
    mapped: mapped pages would count as resident."""

    rows: Path
    new: Path
    vocab_size: int

    @staticmethod
    def of(folder: Path, task: str, sample: Sample, vocab_size: int) -> Stored:
        asked = json.dumps([task, sample.key, sample.prompt, sample.following, sample.new_tokens])
        name = hashlib.sha256(asked.encode()).hexdigest()[:32]
        return Stored(folder / f"{name}.bin", folder / f"{name}.json", vocab_size)

    def logits(self, index: int) -> torch.Tensor:
        """Row ``index``, (vocab,). Raises FileError if it is not there."""
        import torch

        row = torch.empty(self.vocab_size, dtype=torch.float32)
        try:
            file = os.open(self.rows, os.O_RDONLY)
            try:
                count = os.preadv(file, [row.numpy().data], index * row.nbytes)
            finally:
                os.close(file)
        except OSError as error:
            raise _gone(self.rows, error.strerror) from error
        if count < row.nbytes:
            raise _gone(self.rows, f"it has no row {index}")
        return row

    @property
    def tokens(self) -> list[int]:
        """Raises FileError if they are not there."""
        try:
            found: list[int] = json.loads(self.new.read_text())
        except OSError as error:
            raise _gone(self.new, error.strerror) from error
        return found

    def keep(self, rows: Iterable[torch.Tensor], tokens: list[int]) -> None:
        """Writes both, each whole or not at all. Raises FileError."""
        try:
            self.rows.parent.mkdir(exist_ok=True)
            with _whole(self.rows) as file:
                for row in rows:
                    file.write(row.numpy().data)
            with _whole(self.new) as file:
                file.write(json.dumps(tokens).encode())
        except OSError as error:
            raise FileError(
                f"{error.filename or self.rows} cannot be written: {error.strerror}", "Name another folder with --out."
            ) from error


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that has its name once it is complete."""
    part = path.with_suffix(path.suffix + ".part")
    with open(part, "wb") as file:
        yield file
    os.replace(part, path)


def _gone(path: Path, reason: str | None) -> FileError:
    return FileError(f"{path}, which the exact model left, cannot be read: {reason}", "Measure in a new folder.")
