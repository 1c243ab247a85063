"""Going on with a copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tightfit.catalog import technique
from tightfit.lab.tasks.answers import Written


@technique(
    seam="tasks",
    name="copy",
    paper="https://arxiv.org/abs/2402.01032",
    exact=True,
    summary="the next line of code that is being repeated",
)
@dataclass(frozen=True)
class Copy(Written):
    """Code of ``tokens`` tokens, its first lines once more, and the line that comes next, after "Repeat After Me". The
    prompt is up to twice as long."""

    form: ClassVar = "copy"
    tokens: str = "5%/20%/45%"
