"""What the decoder and the engine ask of a cache of keys and values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import ops
from tightfit.kernels.attention import Scoring, rotate_
from tightfit.kernels.pages import Counts
from tightfit.kv.method import BLOCK as BLOCK

Move = Callable[[torch.Tensor], None]  # writes a flat uint8 tensor somewhere, or fills it from there


@dataclass(frozen=True)
class Rotation:
    """How keys turn with positions: pairs of features by so many radians for each, neighbours if ``interleaved``, else
    those of the two halves."""

    frequencies: tuple[float, ...] = ()
    interleaved: bool = False


@dataclass(frozen=True)
class LayerLayout:
    """What one layer keeps of one sequence: ``slots`` tokens, of which a query sees ``window``.

    ``shared`` values are the first ``value_dim`` features of the keys and take no bytes. With ``past`` a query sees the
    tokens before its own, without that one. ``rotation`` is None where it depends on the length of a sequence, or keys
    are not only turned.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    slots: int
    shared: bool = False
    window: int | None = None
    heads: int = 1
    past: bool = False
    rotation: Rotation | None = None


class SegmentLike(Protocol):
    """A segment of a batch (:class:`tightfit.model.batch.Segment`)."""

    slot: int
    start: int
    length: int | None

    @property
    def stop(self) -> int: ...


class Step(Protocol):
    """What a cache reads of a batch (:class:`tightfit.model.batch.Batch`)."""

    @property
    def places(self) -> torch.Tensor: ...
    @property
    def paths(self) -> torch.Tensor | None: ...
    @property
    def committed(self) -> torch.Tensor: ...
    @property
    def tentative(self) -> bool: ...
    @property
    def vector(self) -> int: ...
    @property
    def split(self) -> Any: ...
    @property
    def prefills(self) -> Sequence[tuple[Any, int, int]]: ...
    @property
    def segments(self) -> Sequence[Any]: ...
    @property
    def ranges(self) -> Sequence[tuple[int, int]]: ...


class Turn(NamedTuple):
    """Cosines and sines (tokens, half) by which queries and keys are turned, and, where a cache counts positions anew,
    those for queries that look at its first tokens."""

    tables: tuple[torch.Tensor, torch.Tensor]
    interleaved: bool
    anchors: tuple[torch.Tensor, torch.Tensor] | None = None

    def apply(self, q_: torch.Tensor, k_: torch.Tensor | None, anchored: bool, ws: Workspace) -> torch.Tensor | None:
        """Turns ``q`` and ``k`` in place. Gives, where layers are ``anchored`` and queries look at their first tokens
        from elsewhere, these queries, in scratch memory of the enclosing frame."""
        anchor_q = None
        if self.anchors is not None and anchored:
            anchor_q = ws.empty(*q_.shape)
            ops.copy_(anchor_q, q_)
            rotate_(anchor_q, *self.anchors, self.interleaved, ws)
        for x_ in (q_,) if k_ is None else (q_, k_):
            rotate_(x_, *self.tables, self.interleaved, ws)
        return anchor_q


class Turned(NamedTuple):
    """In place of a :class:`Turn` where queries and keys were turned already: what it gave."""

    anchor_q: torch.Tensor

    def apply(self, q_: torch.Tensor, k_: torch.Tensor | None, anchored: bool, ws: Workspace) -> torch.Tensor | None:
        return self.anchor_q if anchored else None


def before(scoring: Scoring) -> Scoring:
    """How queries look that stand at the token before their own: they see their own window but for themselves."""
    return scoring._replace(window=None if scoring.window is None else scoring.window - 1)


def check_alone(step: Step) -> None:
    """Raises ValueError for tokens beside each other of which each needs all that the one before gives."""
    if step.tentative:
        raise ValueError("what reads a later layer of the token before cannot be computed with it")


class BaseCache(ABC):
    """The ``kv`` account. Tokens are tentative when they are added, and certain once :meth:`commit` says so.

    ``gemm_dtype`` is what prefill multiplies in; with torch.bfloat16 attention does too.
    """

    sequences: int
    gemm_dtype: torch.dtype
    layouts: list[LayerLayout]
    owners: list[int]  # of each layer the one whose keys and values it reads: itself, or another one
    anchors = 0  # first tokens that queries see from another position than their own
    whole_entries = False  # whether what is saved is all of a sequence, or what some tokens of it added
    settled = True  # whether what a step adds stays as it is
    repeatable = True  # whether steps that decode as many tokens compute the same operations

    def standing(self, step: Step, positions: torch.Tensor) -> torch.Tensor:
        """Where the tokens of a step stand that are at ``positions`` (tokens,) of their sequences."""
        return positions

    def anchor_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """The positions from which queries at ``positions`` look at the anchors."""
        return positions

    def owner(self, layer: int) -> int:
        """The layer whose keys and values a layer reads. If that is another one, it has none of its own."""
        return self.owners[layer]

    @property
    def own(self) -> list[int]:
        """The layers that have keys and values of their own."""
        return [layer for layer, owner in enumerate(self.owners) if layer == owner]

    @property
    def awaited(self) -> set[int]:
        """The layers whose keys and values are read before they are there, by earlier layers."""
        return {owner for layer, owner in enumerate(self.owners) if owner > layer}

    @property
    def stored(self) -> BaseCache:
        """The cache that holds what is kept: itself, or one that it is around."""
        return self

    @property
    def fetched(self) -> Counts:
        """What a tier that reads ahead brought from its file so far."""
        return Counts(0, 0, 0, 0)

    @contextmanager
    def through(self, step: Step, ws: Workspace) -> Iterator[None]:
        """Inside, a step goes through all layers in turn. Of what is awaited, a prompt's tokens are zeros at first."""
        yield

    @contextmanager
    def provisional(self, again: bool) -> Iterator[None]:
        """Inside, layers are computed that will be computed ``again`` with what they add: it is read until then, and
        nothing is judged by it."""
        self.settled = not again
        try:
            yield
        finally:
            self.settled = True

    @abstractmethod
    def update(
        self,
        layer: int,
        step: Step,
        q_: torch.Tensor | None,
        k_: torch.Tensor | None,
        v: torch.Tensor | None,
        turn: Turn | Turned | None,
        ws: Workspace,
    ) -> Any:
        """Adds ``k`` (n, kv_heads, key_dim) and ``v`` (n, kv_heads, value_dim) of a step's tokens to a layer, after
        ``q`` (n, heads, key_dim) and ``k`` were turned in place. No ``v`` where values are a view of keys, and neither
        where the layer reads another one's. What it gives is for :meth:`attend_step`, and lies in the enclosing frame
        of ``ws``."""

    @abstractmethod
    def attend_step(
        self, layer: int, step: Step, held: Any, q: torch.Tensor, out: torch.Tensor, ws: Workspace, scoring: Scoring
    ) -> None:
        """Attention of the step's tokens, ``q`` (n, heads, key_dim), into ``out`` (n, heads, value_dim). Prompt tokens
        are certain afterwards."""

    @property
    def reads(self) -> bool:
        """Whether methods go by what tokens there are."""
        return False

    def resolve(self, encode: Callable[[str], list[int]]) -> None:  # noqa: B027
        """Finds the tokens that methods look for, whose texts ``encode`` knows. Raises UsageError for texts that are
        not one token."""

    def told(self, slot: int, start: int, tokens: Sequence[int]) -> None:  # noqa: B027
        """These tokens of a sequence are computed next, from place ``start`` on."""

    @abstractmethod
    def begin(self, slot: int, start: int) -> None:
        """The next tokens of a sequence come at ``start``: what was kept from there on is forgotten."""

    @abstractmethod
    def prefilled(self, slot: int, start: int, stop: int) -> None:
        """Tokens ``start`` to ``stop`` of a prompt went through all layers."""

    @abstractmethod
    def commit(self, slot: int, path: Sequence[int], ws: Workspace) -> None:
        """Of a sequence's tentative tokens those of ``path``, ascending, are certain now, and the others gone."""

    def room(self, slot: int) -> int:
        """How many tokens may be tentative at once, one behind the other: no further than to the next moment at which
        the cache changes what it keeps."""
        return 1 << 30

    def reusable(self, slot: int, common: int) -> int:
        """How many of the first ``common`` tokens that a sequence has had can be kept when it goes on differently."""
        return common

    @abstractmethod
    def largest_entry(self, chunk: int) -> int:
        """The most bytes that :meth:`save` puts for a chunk of ``chunk`` tokens."""

    @abstractmethod
    def entry_nbytes(self, slot: int, start: int, stop: int) -> int:
        """The bytes that :meth:`save` would put now; 0 where some of these tokens are no longer kept."""

    @abstractmethod
    def save(self, slot: int, start: int, stop: int, put: Move) -> None:
        """Gives to ``put``, part by part, what tokens ``start`` to ``stop`` added to a sequence; with
        ``whole_entries`` all of the sequence, which has ``stop`` tokens and none that are tentative."""

    @abstractmethod
    def restore(self, slot: int, start: int, stop: int, get: Move) -> None:
        """Has ``get`` fill what :meth:`save` gave, in the same order: the sequence has ``stop`` tokens afterwards, and
        goes on with the same bits. Tokens before ``start`` must be there. What ``get`` raises leaves a sequence that
        can only begin anew, or where it was before."""

    def close(self) -> None:  # noqa: B027 (most have nothing to give back)
        """Gives back what is not memory."""

    def rehearse(self, count: int) -> None:  # noqa: B027
        """Does what ``count`` prompt tokens cost beside the ledger's memory, once."""

    @contextmanager
    def whole(self, layer: int, segment: Any, ws: Workspace) -> Iterator[None]:
        """Inside, the chunks of a whole prompt go through one layer; at the end they are certain there. Raises
        UsageError if layers cannot be computed one after the other."""
        yield
