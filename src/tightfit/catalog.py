"""The catalog of techniques, and the spec strings that name them.

A technique is a dataclass whose fields are its settings, registered with :func:`technique`. A spec string is the same
everywhere, on the command line, in plans and in results: ``name`` or ``name(key=value,...)``, composed with ``+``, for
example ``snapkv(keep=1024)+int4(group=32)``.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from tightfit.errors import UsageError

# The packages whose import registers a seam's techniques. A package listed here must not import torch when imported.
SEAMS = {
    "weights": ("tightfit.weights.formats",),
    "experts": ("tightfit.experts",),
    "kv": (
        "tightfit.kv.evict",
        "tightfit.kv.merge",
        "tightfit.kv.quantize",
        "tightfit.kv.lowrank",
        "tightfit.kv.select",
        "tightfit.kv.offload",
        "tightfit.kv.share",
    ),
}

VALUE_TYPES: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}

Class = TypeVar("Class", bound=type)


@dataclass(frozen=True)
class Technique:
    """One entry of the catalog: ``cls`` is the dataclass whose fields are the technique's settings."""

    seam: str
    name: str
    cls: type
    paper: str
    exact: bool  # gives the same result as doing without it
    summary: str

    @property
    def settings(self) -> dict[str, Any]:
        """``{field: default}``; a field without a default has ``dataclasses.MISSING``."""
        return {field.name: field.default for field in dataclasses.fields(self.cls)}


TECHNIQUES: dict[tuple[str, str], Technique] = {}


def technique(*, seam: str, name: str, paper: str, exact: bool, summary: str) -> Callable[[Class], Class]:
    """Registers a dataclass as the technique ``name`` of ``seam``, and sets ``name`` on the class.

    ``paper`` is a title or address ("" for common practice), ``exact`` says that results do not change, ``summary`` is
    one line. Fields are of type bool, int, float or str. Raises ValueError if the name is taken.
    """

    def register(cls: Class) -> Class:
        known = TECHNIQUES.get((seam, name))
        if known is not None and known.cls.__qualname__ != cls.__qualname__:
            raise ValueError(f"two techniques of seam {seam!r} are named {name!r}: {known.cls} and {cls}")
        cls.name = name  # type: ignore[attr-defined]
        TECHNIQUES[seam, name] = Technique(seam, name, cls, paper, exact, summary)
        return cls

    return register


def all_techniques() -> list[Technique]:
    """Every technique there is, sorted by seam and name."""
    for seam in SEAMS:
        _load(seam)
    return sorted(TECHNIQUES.values(), key=lambda entry: (entry.seam, entry.name))


def parse(seam: str, text: str) -> list[Any]:
    """The techniques that the spec string ``text`` names, in its order.

    Raises UsageError for a malformed string, an unknown name or field (the known ones are listed), a value of the
    wrong type, a missing field, and whatever the technique's own validation refuses.
    """
    _load(seam)
    return [_parse_one(seam, part) for part in split(text, "+", text)]


def parse_one(seam: str, text: str) -> Any:
    """The one technique that ``text`` names. Raises UsageError as :func:`parse` does, and for a composition."""
    techniques = parse(seam, text)
    if len(techniques) != 1:
        raise UsageError(f"{text!r} names {len(techniques)} techniques", f"Give one technique for {seam}.")
    return techniques[0]


def spec_string(*techniques: object) -> str:
    """The inverse of :func:`parse`; fields at their default are left out.

    Raises ValueError for an object that is not a registered technique or has a text value that a spec string cannot
    hold.
    """
    return "+".join(_format_one(item) for item in techniques)


def _load(seam: str) -> None:
    for module in SEAMS.get(seam, ()):
        importlib.import_module(module)


def _parse_one(seam: str, part: str) -> Any:
    name, parenthesis, rest = part.partition("(")
    name = name.strip()
    if parenthesis and not rest.endswith(")"):
        raise UsageError(f"cannot read {part!r}: text after the closing parenthesis", _syntax(seam))
    entry = TECHNIQUES.get((seam, name))
    if entry is None:
        known = ", ".join(sorted(known for entry_seam, known in TECHNIQUES if entry_seam == seam))
        raise UsageError(f"unknown technique {name!r} for {seam}", f"Known ones: {known or 'none'}.")

    settings = entry.settings
    values: dict[str, Any] = {}
    arguments = rest[:-1].strip()
    for argument in split(arguments, ",", part) if arguments else ():
        key, equals, value = (piece.strip() for piece in argument.partition("="))
        if not equals:
            raise UsageError(f"cannot read {argument!r} in {part!r}: a setting is key=value", _syntax(seam))
        if key not in settings:
            known = ", ".join(f"{field}={default}" for field, default in _shown(settings).items())
            raise UsageError(f"{name} has no setting {key!r}", f"Known ones: {known or 'none'}.")
        if key in values:
            raise UsageError(f"{part!r} gives {key!r} twice", "Give each setting once.")
        values[key] = _convert(value, get_type_hints(entry.cls)[key], f"{key} of {name}")

    missing = [key for key, default in settings.items() if default is dataclasses.MISSING and key not in values]
    if missing:
        raise UsageError(
            f"{name} needs {', '.join(missing)}", f"Write {name}({','.join(f'{m}=...' for m in missing)})."
        )
    return entry.cls(**values)


def _convert(value: str, kind: type, what: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        return kind(value)
    except (KeyError, ValueError):
        raise UsageError(f"{what} cannot be {value!r}", f"It must be {VALUE_TYPES[kind]}.") from None


def _format_one(item: object) -> str:
    entry = next((entry for entry in TECHNIQUES.values() if entry.cls is type(item)), None)
    if entry is None:
        raise ValueError(f"{item!r} is not a registered technique")
    arguments = []
    for key, default in entry.settings.items():
        value = getattr(item, key)
        if value == default:
            continue
        whole = isinstance(value, float) and value.is_integer()
        text = str(value).lower() if isinstance(value, bool) else str(int(value) if whole else value)
        if not _writable(text):
            raise ValueError(f"{key}={value!r} of {entry.name} cannot be written in a spec string")
        arguments.append(f"{key}={text}")
    return f"{entry.name}({','.join(arguments)})" if arguments else entry.name


def _writable(text: str) -> bool:
    try:
        return split(text, ",", text) == [text]
    except UsageError:
        return False


def split(text: str, separator: str, whole: str) -> list[str]:
    """``text`` split at the separators that stand outside of parentheses. Raises UsageError if those do not match."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == separator and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    if depth != 0:
        raise UsageError(f"the parentheses in {whole!r} do not match", "Write name(key=value,...).")
    return [*parts, text[start:].strip()]


def _shown(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: "..." if default is dataclasses.MISSING else default for key, default in settings.items()}


def _syntax(seam: str) -> str:
    return f"Write name or name(key=value,...) and join several with +, for example --{seam} 'name(key=1)+other'."
