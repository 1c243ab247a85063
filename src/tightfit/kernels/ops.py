"""The list of operations that a model is computed with, and which implementation of each runs.

Every operation writes into tensors that the caller gives (``out`` and arguments whose names end in ``_``), so that no
memory is taken behind the ledger's back. Operations that need scratch take a
:class:`~tightfit.budget.ledger.Workspace`. The references in :mod:`tightfit.kernels.reference` define the results;
faster versions must agree with them.

Inside :func:`dry` operations return at once and write nothing: the decoder then only takes its scratch, which is how
the plan knows the size of the workspace exactly. Inside :func:`recorded` they are noted too, to be repeated without the
Python between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from tightfit.kernels import reference, rows

Function = TypeVar("Function", bound=Callable[..., Any])
_dry = False
_program: Program | None = None


@contextmanager
def dry() -> Iterator[None]:
    """While inside, operations compute nothing."""
    global _dry
    before, _dry = _dry, True
    try:
        yield
    finally:
        _dry = before


def is_dry() -> bool:
    return _dry


class Program:
    """Operations with their arguments: the same tensors, whatever is in them when it runs."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]] = []

    def add(self, function: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append((function, args, kwargs))

    def run(self) -> None:
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


@contextmanager
def recorded() -> Iterator[Program]:
    """While inside, operations are computed and noted."""
    global _program
    before, _program = _program, Program()
    try:
        yield _program
    finally:
        _program = before


def op(function: Function) -> Function:
    """Marks an operation: it is skipped inside :func:`dry`. For functions that only write to their arguments, and that
    call no other operation."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not _dry:
            function(*args, **kwargs)
            if _program is not None:
                _program.add(function, args, kwargs)

    call.__name__, call.__doc__, call.__wrapped__ = function.__name__, function.__doc__, function  # type: ignore[attr-defined]
    return cast(Function, call)


rms_norm = op(rows.rms_norm)
add_ = op(rows.add_)
scale_ = op(reference.scale_)
clamp_ = op(reference.clamp_)
softcap_ = op(rows.softcap_)
glu = op(rows.glu)
rotation = op(reference.rotation)
rotate_ = op(reference.rotate_)
gather_rows = op(reference.gather_rows)
copy_ = op(reference.copy_)
load_queries = op(reference.load_queries)
fold_block = op(reference.fold_block)
finish_fold = op(reference.finish_fold)
causal_mask = op(reference.causal_mask)
route = op(reference.route)
zero_ = op(reference.zero_)
fill_ = op(reference.fill_)
places_before = op(reference.places_before)
add_rows_ = op(reference.add_rows_)
gate_ = op(reference.gate_)
