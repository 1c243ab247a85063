"""Looking values up in a dictionary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tightfit.catalog import technique
from tightfit.lab.tasks.answers import Written


@technique(
    seam="tasks",
    name="lookup",
    paper="https://arxiv.org/abs/2307.03172",
    exact=True,
    summary="values of keys in a dictionary that fills the context",
)
@dataclass(frozen=True)
class Lookup(Written):
    """A dictionary of words to five-digit numbers, and one of them asked for, after the key-value retrieval of "Lost in
    the Middle". It departs from that in that keys are words instead of random identifiers: small models can do it.
    Every entry counts alike, so that a cache which keeps what looks important has nothing to go by."""

    form: ClassVar = "dictionary"
