"""Compositions of methods: ``snapkv(keep=512,budget=adakv)+int4+host``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tightfit.catalog import parse, spec_string
from tightfit.errors import UsageError
from tightfit.kv.evict.window import Window
from tightfit.kv.lowrank.think import ThinK
from tightfit.kv.method import Evictor, Method, Quantizer
from tightfit.kv.offload.host import Host
from tightfit.kv.select.quest import Quest
from tightfit.kv.share.kvsharer import KVSharer

if TYPE_CHECKING:
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
    def key_codec(self) -> Quantizer | None:
        return next((m for m in self.methods if isinstance(m, Quantizer) and m.of in ("both", "keys")), None)

    @property
    def value_codec(self) -> Quantizer | None:
        return next((m for m in self.methods if isinstance(m, Quantizer) and m.of in ("both", "values")), None)

    @property
    def pruner(self) -> ThinK | None:
        return self._only(ThinK)

    @property
    def selector(self) -> Quest | None:
        return self._only(Quest)

    @property
    def tier(self) -> Host | None:
        return self._only(Host)

    @property
    def sharer(self) -> KVSharer | None:
        return self._only(KVSharer)

    @property
    def exact(self) -> bool:
        """Whether all that a layer has is kept as it is."""
        return all(isinstance(method, KVSharer) for method in self.methods)

    @property
    def recent(self) -> int:
        """How many of the last tokens are neither coded nor pruned."""
        return max([m.recent for m in self.methods if isinstance(m, Quantizer | ThinK)], default=0)

    def check(self, layouts: Sequence[LayerLayout]) -> None:
        """Raises UsageError if a layer cannot use a method."""
        for method in self.methods:
            for layout in layouts:
                reason = method.refusal(layout)
                if reason is None and layout.past and isinstance(method, Evictor) and method.observes != "nothing":
                    reason = "its tokens do not see themselves, and what they see is not observed then"
                if reason is not None:
                    raise UsageError(f"this model cannot use {method.name}: {reason}", "Leave it out.")

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
    composition = Composition(tuple(methods))
    evictor = composition.evictor
    if composition.selector is not None and isinstance(evictor, Window):
        raise UsageError(
            "quest chooses among all pages, and window hides all but a few of them",
            "Leave quest out: a window is read whole.",
        )
    return composition


def fitted(text: str) -> KVSharer:
    """The method in a spec string that must know something of a model. Raises UsageError if there is none."""
    sharer = compose(text).sharer
    if sharer is None:
        raise UsageError(f"no method of {text!r} has to know anything of a model", "Only kvsharer does.")
    return sharer
