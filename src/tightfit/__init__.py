"""Runs large language models inside a memory budget that the user states.

>>> import tightfit
>>> model = tightfit.load("nano", memory="600MiB")
>>> print(model.generate("def fibonacci(n):", max_new_tokens=32).text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tightfit.api import Model, load
    from tightfit.errors import BudgetError, CheckpointError, TightfitError, UsageError

_WHERE = {
    "Model": "tightfit.api",
    "load": "tightfit.api",
    "TightfitError": "tightfit.errors",
    "BudgetError": "tightfit.errors",
    "CheckpointError": "tightfit.errors",
    "UsageError": "tightfit.errors",
}

__all__ = ["BudgetError", "CheckpointError", "Model", "TightfitError", "UsageError", "__version__", "load"]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module 'tightfit' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)
