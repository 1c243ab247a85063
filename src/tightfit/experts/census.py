"""Which experts a text activates: counted once, kept as JSON in the user's cache folder under the model's
fingerprint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tightfit.budget.machine import cache_folder, remember
from tightfit.errors import CheckpointError


@dataclass(frozen=True)
class Census:
    """``shares[i][j]``: of the ``tokens`` tokens of a text the share that chose expert j of the i-th mixture."""

    model: str
    tokens: int
    shares: list[list[float]]

    def most_used_half(self) -> list[float]:
        """Of each mixture the smallest share of its experts on which half of all choices fall."""
        result = []
        for row in self.shares:
            left, count = sum(row) / 2, 0
            for share in sorted(row, reverse=True):
                if left <= 0:
                    break
                left -= share
                count += 1
            result.append(count / len(row))
        return result


def census_file(fingerprint: str) -> Path:
    return cache_folder() / f"experts-{fingerprint[:32]}.json"


def read_census(name: str, fingerprint: str, layers: int, experts: int) -> Census:
    """The census of the model ``name``. Raises CheckpointError if there is none, or none of its mixtures."""
    path = census_file(fingerprint)
    count = "Count with `tightfit census MODEL --file TEXT` which experts a text activates."
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        census = Census(values["model"], values["tokens"], values["shares"])
        fits = [len(row) for row in census.shares] == [experts] * layers
        fits &= all(isinstance(share, (int, float)) for row in census.shares for share in row)
    except FileNotFoundError:
        raise CheckpointError(f"the experts of {name} were never counted", count) from None
    except (OSError, ValueError, KeyError, TypeError):
        fits = False
    if not fits:
        raise CheckpointError(f"{path} is not a census of the experts of {name}", count)
    return census


def write_census(fingerprint: str, census: Census) -> Path:
    """Keeps a census, whole or not at all; gives the file. Raises FileError."""
    return remember(census_file(fingerprint), json.dumps(asdict(census)))
