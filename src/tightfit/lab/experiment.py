"""An experiment: one model, some tasks, and the configurations that are compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any, Literal, get_args

from tightfit.budget.units import parse_bytes
from tightfit.catalog import all_techniques, parse_one, spec_string, split
from tightfit.engine.opening import Wish, wanted_cache
from tightfit.errors import UsageError
from tightfit.experts.policy import scheme
from tightfit.kv.compose import compose
from tightfit.plan.schema import ActivationType, Schedule

VERSION: Literal[1] = 1
EXACT = "exact"  # the key of the configuration that the others are compared with
EXACT_WISH = {"weights": "f32", "activations": "float32", "kv": "none"}
AS_GIVEN = "as given"  # the key of the only other one where nothing is varied
ALL = "all"
WITH_ALL = ("weights", "kv")  # seams whose techniques ``all`` stands for
SYNTAX = 'Write --vary "kv=[none,int4]" or --vary "kv=all", with ; between alternatives: "weights=int4; kv=all".'


@dataclass(frozen=True)
class Configuration:
    """One way to run the model. ``vary`` is in what it differs from the others, ``wish`` all that is asked for, as
    fields of :class:`~tightfit.engine.opening.Wish`. Its ``key`` names it in results."""

    key: str
    vary: dict[str, Any]
    wish: dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """What a folder of results is about: all that is needed to do it again.

    ``tasks`` are spec strings, ``text`` names and SHA-256 of the files that samples are made of, ``context`` is how
    many tokens samples have at most, ``common`` the wish that configurations share. The first of ``configurations`` is
    the exact model. ``machine`` and ``versions`` are those that it was begun with; ``command`` is for people.
    """

    model: str
    fingerprint: str
    tasks: list[str]
    seed: int
    context: int
    text: list[dict[str, str]]
    common: dict[str, Any]
    configurations: list[Configuration]
    machine: dict[str, Any]
    versions: dict[str, str]
    command: str
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def of_json(values: dict[str, Any]) -> Experiment:
        """The inverse of :meth:`to_json`. Raises KeyError or TypeError for anything else."""
        if values["version"] != VERSION:
            raise KeyError("version")
        configurations = [Configuration(**each) for each in values["configurations"]]
        return Experiment(**values | {"configurations": configurations})

    def difference(self, other: Experiment) -> str | None:
        """In what ``other`` is another experiment, so that its results do not go with those of this one; None if
        they do."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine == theirs or field.name == "command":
                continue
            if field.name == "configurations":
                mine, theirs = ([asdict(each) for each in configurations] for configurations in (mine, theirs))
                mine, theirs = ([each for each in a if each not in b] for a, b in ((mine, theirs), (theirs, mine)))
                mine, theirs = ([f"{each['key']} {each['wish']}" for each in some] for some in (mine, theirs))
            return f"{field.name}: {mine} there, {theirs} here"
        return None


def configurations(varied: Iterable[str], common: Mapping[str, Any], exact: str | None) -> list[Configuration]:
    """The exact model, and the product of what each of ``varied`` says: ``kv=[none,int4]``, ``weights=all``, or several
    of these with ``;`` between them, of which one is taken at a time. What ``common`` has is the same in all, unless it
    is varied; ``exact`` (``weights=bf16,kv=none``) is asked of the exact model beside what it is by default, which has
    the threads in common with the others.

    Raises UsageError for names and values that make no sense whatever the model.
    """
    common = {name: value for name, value in common.items() if value is not None}
    axes = [_axis(text) for text in varied]
    names = [name for axis in axes for name in dict.fromkeys(name for name, _ in axis)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"{twice[0]} is varied twice", "Give all its values in one --vary.")
    found: dict[str, Configuration] = {}
    for choice in product(*axes):
        vary = dict(choice)
        key = ", ".join(f"{name}={value}" for name, value in vary.items()) or AS_GIVEN
        found.setdefault(key, Configuration(key, vary, {**common, **vary}))
    wish = {name: common[name] for name in ("threads",) if name in common} | EXACT_WISH
    for part in split(exact, ",", exact) if exact else ():
        name, value = _named(part)
        wish[name] = _read(name, value)
    return [Configuration(EXACT, {}, wish), *found.values()]


def _axis(text: str) -> list[tuple[str, Any]]:
    """The (name, value) of which one is taken at a time."""
    found = []
    for alternative in split(text, ";", text):
        name, values = _named(alternative)
        listed = values.startswith("[") and values.endswith("]")
        for value in split(values[1:-1], ",", values) if listed else [values]:
            if value == ALL and name in WITH_ALL:
                # Whether the model can use them is found out when they are run.
                found += [(name, entry.name) for entry in all_techniques() if entry.seam == name]
            else:
                found.append((name, _read(name, value)))
    return found


def _named(text: str) -> tuple[str, str]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if name not in READERS:
        raise UsageError(f"{name!r} cannot be varied", f"These can: {', '.join(READERS)}.")
    if not equals or not value:
        raise UsageError(f"cannot read {text!r}", SYNTAX)
    return name, value


def _read(name: str, value: str) -> Any:
    """A value as a wish has it. Raises UsageError."""
    try:
        return READERS[name](value)
    except ValueError:
        raise UsageError(f"{name} cannot be {value!r}", SYNTAX) from None


def _memory(value: str) -> str:
    if not value.endswith("%"):
        parse_bytes(value)
    return value


def _weights(value: str) -> str:
    return spec_string(parse_one("weights", value))


def _experts(value: str) -> str:
    scheme(value)
    return value


def _kv(value: str) -> str:
    methods, _ = wanted_cache(value)
    return value if methods is None else str(compose(methods))


def _one_of(known: tuple[str, ...]) -> Callable[[str], str]:
    def read(value: str) -> str:
        if value not in known:
            raise UsageError(f"there is no {value!r}", f"Known ones: {', '.join(known)}.")
        return value

    return read


READERS: dict[str, Callable[[str], Any]] = {
    "memory": _memory,
    "context": int,
    "weights": _weights,
    "chunk": int,
    "threads": int,
    "activations": _one_of(get_args(ActivationType)),
    "experts": _experts,
    "kv": _kv,
    "prefill": _one_of(get_args(Schedule)),
}
assert READERS.keys() <= {field.name for field in fields(Wish)}
