"""Cold pages in a file."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.catalog import technique
from tightfit.kv.method import Tier


@technique(
    seam="kv",
    name="host",
    paper="https://arxiv.org/abs/2303.06865",
    exact=True,
    summary="all but the latest pages lie in a file and are read when they are needed",
)
@dataclass(frozen=True)
class Host(Tier):
    """Each head's last ``resident`` tokens are in memory, in whole pages, and the others in a file without a name in
    ``folder`` (default: the system's for temporary files), read with pread into scratch memory as they are needed
    (after FlexGen's offloading of the cache). With a selector only what is selected is read. Sums are made in another
    order; nothing else changes.
    """
