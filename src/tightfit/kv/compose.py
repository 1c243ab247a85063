"""Compositions of methods: ``snapkv(keep=512,budget=adakv)+int4+host``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, TypeVar

from tightfit.catalog import all_techniques, parse, spec_string
from tightfit.errors import UsageError
from tightfit.kv.fitted import Fitted, Known, known_for
from tightfit.kv.lowrank.projector import Projector
from tightfit.kv.lowrank.think import ThinK
from tightfit.kv.method import Coder, Evictor, Method, Reads, Rest, Selector, Streamer, Tier
from tightfit.kv.share.kvsharer import KVSharer

if TYPE_CHECKING:
    import torch

    from tightfit.kv.base import LayerLayout

EXACT = "none"  # the spec string of a cache that keeps everything as it is
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Composition:
    """Methods of which each fills roles of its own. None at all is a cache that keeps everything."""

    methods: tuple[Method, ...] = ()

    @property
    def evictor(self) -> Evictor | None:
        return self._only(Evictor)

    @property
    def streamer(self) -> Streamer | None:
        return self._only(Streamer)

    @property
    def key_codec(self) -> Coder | None:
        return next((m for m in self.methods if isinstance(m, Coder) and "codec of keys" in m.roles), None)

    @property
    def value_codec(self) -> Coder | None:
        return next((m for m in self.methods if isinstance(m, Coder) and "codec of values" in m.roles), None)

    @property
    def pruner(self) -> ThinK | None:
        return self._only(ThinK)

    @property
    def selector(self) -> Selector | None:
        return self._only(Selector)

    @property
    def tier(self) -> Tier | None:
        return self._only(Tier)

    @property
    def projector(self) -> Projector | None:
        return self._only(Projector)

    @property
    def rest(self) -> Rest | None:
        return self._only(Rest)

    @property
    def reads(self) -> Reads | None:
        """The one that goes by what tokens there are."""
        return self._only(Reads)

    @property
    def fitted(self) -> list[Fitted]:
        """Those that must know something of a model."""
        return [method for method in self.methods if isinstance(method, Fitted)]

    @property
    def joined(self) -> bool:
        """Whether layers need each other, or are not alike."""
        return bool(self.fitted) or any(method.joined for method in self.methods)

    @property
    def exact(self) -> bool:
        """Whether all that a layer has, or what it is projected to, is kept as it is."""
        return all(isinstance(method, KVSharer | Projector) for method in self.methods)

    @property
    def recent(self) -> int:
        """How many of the last tokens are neither coded nor pruned."""
        return max([m.recent for m in self.methods if isinstance(m, Coder | ThinK)], default=0)

    def with_found(self, known: Known, keep: Callable[[torch.Tensor], torch.Tensor]) -> Composition:
        """The same composition, where methods that compute with what was found have it, as ``keep`` gives it."""
        methods = []
        for method in self.methods:
            if isinstance(method, Fitted) and method.computes:
                method = method.with_found({name: keep(tensor) for name, tensor in known.of(method).items()})
            methods.append(method)
        return Composition(tuple(methods))

    def check(self, layouts: Sequence[LayerLayout]) -> None:
        """Raises UsageError if a layer cannot use a method."""
        for method in self.methods:
            for layout in layouts:
                reason = method.refusal(layout)
                judges = isinstance(method, Evictor) and method.observes != "nothing"
                if reason is None and layout.past and (judges or isinstance(method, Rest)):
                    reason = "its tokens do not see themselves, and what they see is not observed then"
                if reason is not None:
                    raise UsageError(f"this model cannot use {method.name}: {reason}", "Leave it out.")

    def of_layer(self, layer: int, known: Known) -> Composition:
        """The composition of one layer."""
        return Composition(tuple(part for method in self.methods for part in method.of_layer(layer, known)))

    def _only(self, kind: type[Kind]) -> Kind | None:
        return next((method for method in self.methods if isinstance(method, kind)), None)

    def __str__(self) -> str:
        return spec_string(*self.methods) if self.methods else EXACT


def compose(text: str) -> Composition:
    """The composition that a spec string names. Raises UsageError if two methods fill the same role, or do not go
    together."""
    if text.strip() == EXACT:
        return Composition()
    methods: list[Method] = parse("kv", text)
    filled: dict[str, Method] = {}
    for method in methods:
        for role in method.roles:
            if role in filled:
                raise UsageError(
                    f"{filled[role].name} and {method.name} are both for the {role}", "Leave one of them out."
                )
            filled[role] = method
    for method, other in permutations(methods, 2):
        reason = method.excludes(other)
        if reason is not None:
            raise UsageError(f"{method.name} does not go with {other.name}: it {reason}", "Leave one of them out.")
    return Composition(tuple(methods))


def fitted(text: str) -> Fitted:
    """The method in a spec string that must know something of a model. Raises UsageError if there is none, or more than
    one."""
    found = compose(text).fitted
    if len(found) != 1:
        what = "no method has" if not found else f"{' and '.join(method.name for method in found)} each have"
        known = sorted(entry.name for entry in all_techniques() if issubclass(entry.cls, Fitted))
        hint = f"Name one of {', '.join(known)}." if not found else "Name one at a time."
        raise UsageError(f"in {text!r} {what} to know something of a model", hint)
    return found[0]


def known_of(kv: str, name: str, fingerprint: str, owners: list[int]) -> Known:
    """What the methods of ``kv`` know of the model ``name``, whose layers were trained to read the keys and values of
    ``owners``. Raises CheckpointError if that was never looked for, UsageError where layers would share twice."""
    composition = compose(kv)
    if owners == list(range(len(owners))):
        return known_for(composition.methods, name, fingerprint, len(owners))
    if composition.fitted:
        method = composition.fitted[0].name
        raise UsageError(
            f"layers of {name} were trained to read what others keep, and {method} is not fitted to such",
            f"Leave {method} out.",
        )
    return Known(owners)
