"""Finished subtasks, of which the conclusions stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.method import Read, Structured

if TYPE_CHECKING:
    import torch

    from tightfit.kv.base import LayerLayout


@technique(
    seam="kv",
    name="tim",
    paper="https://arxiv.org/abs/2507.16784",
    exact=False,
    summary="of finished subtasks only their conclusions, and the positions of the others are used again",
)
@dataclass(frozen=True)
class TIM(Structured):
    """Subtask pruning (Thread Inference Model): a subtask is what lies from the token ``open`` to ``close``, subtasks
    of its own with it, and its conclusion begins with ``conclude``. When a subtask is closed only its conclusion stays,
    or nothing where it has none; the last ``stack`` that were closed stay whole. ``keep`` is the most tokens that can
    be kept, then the oldest go.

    With ``positions=reused`` what comes next stands right behind what is kept, as though nothing had been between: the
    keys of conclusions are turned to where they now stand. Nothing is computed again, so conclusions still depend on
    the subtasks that they were drawn from. With ``positions=original`` every token stays where it was. Marks are texts
    of one token each, or tokens by their numbers (``#17``), with | between. What a query sees is exact for every token,
    whatever the chunks. No token can be a draft.

    The paper's models write JSON, whose structure its runtime follows, and its stack holds lists of subtasks of one
    task; here marks are tokens, and the stack holds single subtasks.

    Nothing that is embedded was trained on such texts, so whether answers stay the same was not measured; that memory
    and positions stay as few as what is not pruned was: 480 tokens of 24 subtasks are 72, at 72 positions.
    """

    open: str = "<subtask>"
    conclude: str = "<conclusion>"
    close: str = "</subtask>"
    stack: int = 0
    positions: str = "reused"

    marks: ClassVar[tuple[str, ...]] = ("open", "conclude", "close")

    def __post_init__(self) -> None:
        if self.keep < 1 or self.stack < 0:
            raise UsageError(
                f"tim cannot keep {self.keep:g} tokens and {self.stack} subtasks",
                "Give the most tokens that can be kept, keep=4096, and a stack of 0 or more.",
            )
        if self.positions not in ("reused", "original"):
            raise UsageError(
                f"there are no positions {self.positions!r}", "Use positions=reused or positions=original."
            )
        if not all(setting.strip("|") for setting in (self.open, self.conclude, self.close)):
            raise UsageError("tim needs tokens that open, conclude and close subtasks", "Give for example open=#17.")
        super().__post_init__()

    @property
    def reuses(self) -> bool:
        return self.positions == "reused"

    def refusal(self, layout: LayerLayout) -> str | None:
        if not self.reuses:
            return None
        if layout.window is not None:
            return "a window counts tokens that are not there any more: use tim(positions=original)"
        if layout.rotation is None:
            return "its keys cannot be turned again: use tim(positions=original)"
        return None

    def ends(self, marks: Mapping[str, frozenset[int]], token: int) -> bool:
        return token in marks["close"]

    def stays(self, read: Read) -> torch.Tensor:
        import torch

        ids, marks = read
        stays = torch.ones(len(ids), dtype=torch.bool)
        wanted = torch.tensor(sorted(frozenset().union(*marks.values())), dtype=ids.dtype)
        opened: list[tuple[int, int | None]] = []  # where unfinished subtasks begin, and where their conclusions do
        closed: list[tuple[int, int]] = []  # what goes of finished ones
        for at in torch.isin(ids, wanted).nonzero()[:, 0].tolist():
            token = int(ids[at])
            if token in marks["open"]:
                opened.append((at, None))
            elif token in marks["conclude"] and opened:
                opened[-1] = opened[-1][0], at
            elif token in marks["close"] and opened:
                start, conclusion = opened.pop()
                closed.append((start, at + 1 if conclusion is None else conclusion))
        for start, stop in closed[: max(len(closed) - self.stack, 0)]:
            stays[start:stop] = False
        return stays
