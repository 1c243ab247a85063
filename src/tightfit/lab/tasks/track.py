"""Following assignments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tightfit.catalog import technique
from tightfit.lab.tasks.answers import Written


@technique(
    seam="tasks",
    name="track",
    paper="https://arxiv.org/abs/2404.06654",
    exact=True,
    summary="what names hold after chains of assignments",
)
@dataclass(frozen=True)
class Track(Written):
    """Assignments of numbers, or of names that were assigned before, and what one of the names holds, after the
    variable tracking of RULER. It departs from that in that chains have random lengths and nothing lies between
    them."""

    form: ClassVar = "chain"
    tokens: str = "6%/25%"
