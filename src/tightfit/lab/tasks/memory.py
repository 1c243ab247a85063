"""Bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tightfit.budget.ledger import ACCOUNTS
from tightfit.catalog import technique
from tightfit.lab.tasks.base import Metric, Reference, Sample, Task, positive
from tightfit.lab.tasks.texts import continued

if TYPE_CHECKING:
    from tightfit.lab.material import Material
    from tightfit.lab.reader import Reader


@technique(
    seam="tasks",
    name="memory",
    paper="",
    exact=True,
    summary="the peak resident set, and each account, with a full context",
)
@dataclass(frozen=True)
class Memory(Task):
    """A prompt and up to ``new`` tokens after it that fill the context. ``peak_rss`` is what the operating system saw
    of the process from its start on (VmHWM); ``kv``, ``weights`` and the like the most that each account held;
    ``kv_read`` what one more token would read of keys and values."""

    new: int = 64

    metrics: ClassVar = (
        Metric("peak_rss", "bytes", "lower", "max"),
        *(Metric(account, "bytes", "lower", "max") for account in ACCOUNTS),
        Metric("kv_read", "bytes", "lower", "max"),
    )

    def __post_init__(self) -> None:
        positive(self, "new")

    def samples(self, material: Material, context: int, seed: int) -> list[Sample]:
        following = min(self.new, context // 2)
        return list(continued(self, material, seed, [context - following], 1, following))

    def measure(self, reader: Reader, sample: Sample, exact: Reference | None) -> dict[str, Any]:
        for _ in reader.follow(sample.prompt, sample.following):
            pass
        receipt = reader.model.receipt()
        accounts = {name: held["peak_bytes"] for name, held in receipt["accounts"].items()}
        unused = dict.fromkeys(ACCOUNTS)
        return {"peak_rss": receipt["peak_rss_bytes"], "kv_read": reader.read_bytes(), **unused, **accounts}
