"""Segments that were learned to be read from their last token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.method import Read, Structured

if TYPE_CHECKING:
    import torch


@technique(
    seam="kv",
    name="anchor",
    paper="https://arxiv.org/abs/2402.07616",
    exact=False,
    summary="of finished segments only their last tokens, for models that were tuned to gather segments there",
)
@dataclass(frozen=True)
class Anchor(Structured):
    """Anchor-based models (AnLLM) were tuned so that a segment's information is in its anchor: the token ``at`` that
    ends it, such as a point or a token of its own. When a segment ends all of it is let go of but that token.

    ``at`` are texts of one token each, or tokens by their numbers (``#17``), with | between. What a query sees is
    exact for every token, whatever the chunks: the anchors, and its own segment. ``keep`` is the most that can be kept,
    then the oldest go. No token can be a draft. The model does the merging, and others lose what they let go of: a tiny
    model that is tuned in the tests predicts all that it should from anchors alone, half of the tokens, and the same
    model untuned one in ten, which is what chance would give.
    """

    at: str = ".|!|?"

    marks: ClassVar[tuple[str, ...]] = ("at",)

    def __post_init__(self) -> None:
        if not self.at.strip("|"):
            raise UsageError("anchor needs tokens that end segments", "Give for example at=.|!|? or at=#17.")
        super().__post_init__()

    def ends(self, marks: Mapping[str, frozenset[int]], token: int) -> bool:
        return token in marks["at"]

    def stays(self, read: Read) -> torch.Tensor:
        import torch

        ids, marks = read
        is_anchor = torch.isin(ids, torch.tensor(sorted(marks["at"]), dtype=ids.dtype))  # (tokens,)
        ends = is_anchor.nonzero()[:, 0]
        segment = int(ends[-1]) + 1 if len(ends) else 0  # the one that has not ended
        return is_anchor | (torch.arange(len(ids)) >= segment)
