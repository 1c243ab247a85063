"""Plans as files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tightfit.errors import UsageError
from tightfit.plan.schema import Plan

MOST_BYTES = 16 << 20  # of a thousand layers, a hundredth of this
WRITE_ONE = "Write one with `tightfit plan MODEL --out FILE`."


def read_plan(path: Path) -> Plan:
    """The plan in a file. Raises UsageError where there is none."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", WRITE_ONE) from None
    try:
        return Plan.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path} is not a plan: {place + ': ' if place else ''}{first['msg']}", WRITE_ONE) from None


def write_plan(path: Path, plan: dict[str, Any]) -> None:
    """Writes a plan whole or not at all. Raises UsageError where it cannot be written."""
    text = Plan.model_validate(plan).model_dump_json(indent=2) + "\n"
    path = path.resolve()
    try:
        if path.exists() and not path.is_file():  # a pipe or a device: there is nothing to replace
            path.write_text(text, encoding="utf-8")
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", "Name a file in a folder of yours.") from None
