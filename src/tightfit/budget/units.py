"""Bytes as people write them: ``600MiB``, ``4GB``, ``2.5GiB``, ``50%``."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from tightfit.errors import UsageError

if TYPE_CHECKING:
    from tightfit.budget.meter import Memory

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
BINARY_UNITS = ((TiB, "TiB"), (GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB"), (1, "B"))
SHORTEST_MARGIN, LONGEST_MARGIN = 32 * MiB, 1 * GiB

# A single letter is binary, as in `docker run --memory 512m`; `MB` is decimal and `MiB` binary, as in ISO/IEC 80000-13.
_FACTORS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _FACTORS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}

_NUMBER = r"([0-9]{1,18}(?:\.[0-9]{0,18})?|\.[0-9]{1,18})"
_BYTES = re.compile(_NUMBER + r"\s*([a-z]*)", re.IGNORECASE)
_PERCENT = re.compile(_NUMBER + r"\s*%")
_EXAMPLES = "Write for example 600MiB, 2.5GiB, 4GB (decimal), 512m (MiB) or a plain number of bytes."


def format_bytes(n: int, ceil: bool = False) -> str:
    """``n`` bytes in the unit that reads best: ``1.5 GiB``, ``600 MiB``, ``1100 MiB``.

    A number that can be written exactly with four digits is; others are rounded to the nearest of three or four
    digits, or upward with ``ceil``, so that a needed budget still works when it is typed in.
    """
    if n < 0:
        return "-" + format_bytes(-n)
    for unit, name in BINARY_UNITS:
        if n >= unit and n < 10000 * unit and n * 100 % unit == 0:
            exact = _decimal(n * 100 // unit)
            if len(exact.replace(".", "")) <= 4:
                return f"{exact} {name}"
    for index, (unit, name) in enumerate(BINARY_UNITS):
        if n >= unit:
            step = 1 if n < 10 * unit else 10 if n < 1000 * unit else 100  # hundredths of the unit
            hundredths = (-(-n * 100 // (unit * step)) if ceil else (n * 200 + unit * step) // (2 * unit * step)) * step
            if hundredths >= 102400 and index > 0:
                hundredths, name = 100, BINARY_UNITS[index - 1][1]
            return f"{_decimal(hundredths)} {name}"
    return "0 B"


def _decimal(hundredths: int) -> str:
    whole, rest = divmod(hundredths, 100)
    return f"{whole}.{rest:02d}".rstrip("0").rstrip(".")


def parse_bytes(text: str) -> int:
    """The number of bytes that ``text`` means, rounded down to a whole byte. Raises UsageError."""
    match = _BYTES.fullmatch(text.strip())
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"'{text}' is not a number of bytes.", _EXAMPLES)
    nbytes = Fraction(match[1]) * factor
    if factor == 1 and nbytes.denominator != 1:
        raise UsageError(f"'{text}' is a fraction of a byte: the unit is missing.", _EXAMPLES)
    return int(nbytes)


def parse_budget(text: str | int | None, memory: Memory) -> int:
    """The budget in bytes for a whole process: a size, a share of what the machine has (``50%``), or the default.

    The default is all that this process could hold now (what is available, and what it holds already) less a margin of
    a sixteenth (32 MiB to 1 GiB) for everything else that runs. Raises UsageError.
    """
    if text is None:
        possible = min(memory.available + memory.resident, memory.total)
        return max(possible - min(max(possible // 16, SHORTEST_MARGIN), LONGEST_MARGIN), 1)
    if isinstance(text, int):
        budget = text
    elif match := _PERCENT.fullmatch(text.strip()):
        percent = Fraction(match[1])
        if percent > 100:
            raise UsageError(f"'{text}' is more than the machine has.", "Write at most 100%, or a size such as 4GiB.")
        budget = int(memory.total * percent / 100)
    else:
        try:
            budget = parse_bytes(text)
        except UsageError as error:
            raise UsageError(
                f"'{text}' is not a memory budget.", f"{_EXAMPLES} 50% is half of what the machine has."
            ) from error
    if budget <= 0:
        raise UsageError(f"A memory budget of {text} holds nothing.", _EXAMPLES)
    return budget
