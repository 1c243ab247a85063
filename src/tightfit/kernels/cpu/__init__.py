"""The compiled CPU kernels, where they were built. Does not import torch.

Which instruction set runs is chosen when this is imported: the fastest that the processor has, or what the environment
variable ``TIGHTFIT_CPU`` names (``avx512``, ``avx2``, ``portable``, or ``reference`` for the torch references).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from tightfit.errors import UsageError

REFERENCE = "reference"

_cpu: Any = None
with suppress(ModuleNotFoundError):  # installed without a compiler
    _cpu = importlib.import_module("tightfit.kernels.cpu._cpu")

module: Any = _cpu  # the compiled kernels; None where they were not built
_compiled = _cpu is not None
_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def supported() -> list[str]:
    """The kernels that can run here, fastest first; the last is the torch reference."""
    return [*(_cpu.supported() if _cpu is not None else ()), REFERENCE]


def use(name: str) -> None:
    """Chooses the kernels ``name`` of :func:`supported`. Raises UsageError if they cannot run here."""
    global _compiled
    if name not in supported():
        raise UsageError(f"this machine cannot run the kernels {name!r}", f"It can run: {', '.join(supported())}.")
    _compiled = name != REFERENCE
    if _compiled:
        _cpu.choose(name)


def available() -> bool:
    """Whether compiled kernels are used; without them everything works through the torch references, slower."""
    return _compiled


def has_gemm() -> bool:
    """Whether the kernels in use multiply with many vectors themselves, in bfloat16 through AMX."""
    return _compiled and bool(_cpu.has_gemm())


def features() -> dict[str, Any]:
    """``compiled``: whether the extension was built; ``supported``: what can run here; ``chosen``; ``threads``."""
    return {
        "compiled": _cpu is not None,
        "supported": supported(),
        "chosen": _cpu.chosen() if _compiled else REFERENCE,
        "threads": _threads,
    }


def threads() -> int:
    """How many threads a kernel uses: at first, as many as the process may run on."""
    return _threads


def set_threads(count: int) -> None:
    """Kernels use ``count`` threads from now on; results do not depend on it."""
    global _threads
    if count < 1:
        raise UsageError(f"kernels cannot run on {count} threads", "Give 1 or more.")
    _threads = count


def handle(
    kind: str,
    group: int,
    asymmetric: bool,
    address: int,
    rows: int,
    cols: int,
    row_offset: int,
    settings: int,
    kept: int,
    half_scales: bool,
) -> Any:
    """The compiled kernels' view of the matrix at ``address`` (see ``kernels/weight.py``); None if there are none."""
    if _cpu is None:
        return None
    return _cpu.Weight(kind, group, asymmetric, address, rows, cols, row_offset, settings, kept, half_scales)


def joined(handles: Sequence[Any]) -> Any:
    """The compiled kernels' view of matrices that are multiplied together, of their :func:`handle`\\ s; or None."""
    return None if _cpu is None else _cpu.Joined(list(handles))


if "TIGHTFIT_CPU" in os.environ:
    use(os.environ["TIGHTFIT_CPU"])
