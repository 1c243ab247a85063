"""The ledger of bytes: accounts, the arenas behind them, and the stack of scratch memory.

An :class:`Account` is a promise of bytes. An :class:`Arena` is the memory behind it: one anonymous mapping made once,
of which tensors are views. Nothing is resident before it is written, so an arena may be mapped, and a decoder built on
it, before it is known whether the plan holds.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tightfit.budget.units import format_bytes
from tightfit.errors import BudgetError

if TYPE_CHECKING:
    import torch

ACCOUNTS = ("runtime", "weights", "experts", "kv", "adapters", "draft", "workspace")
ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
PAGE = mmap.PAGESIZE
KEPT_VIEWS = 1024  # tensors over scratch memory that are kept for the next step: about a kilobyte each
ASKED_AT_ONCE = 1 << 30  # bytes whose residency is asked for in one call: the answer takes a byte for each page
# Address space that is mapped and not written must not count against the system's commit limit. Python has the name
# since 3.13; the number is Linux'.
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def align(nbytes: int, to: int = ALIGNMENT) -> int:
    """``nbytes`` rounded up to a multiple of ``to``."""
    return -(-nbytes // to) * to


class Arena:
    """One anonymous private mapping of ``capacity`` bytes, handed out from the front, never grown.

    Pages become resident when they are first written, so an arena that is mapped and not touched costs address space
    only.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = align(max(capacity, 1), PAGE)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        try:
            self._map = mmap.mmap(-1, self.capacity, flags=flags)
        except OSError as error:  # of address space: nothing is taken yet
            raise BudgetError(
                f"the system does not give {format_bytes(self.capacity)} of address space: {error.strerror}",
                "Lift the limit on it (ulimit -v unlimited), or let memory be overcommitted (vm.overcommit_memory).",
            ) from error
        self.used = 0

    def use_large_pages(self) -> None:
        """Asks for pages of 2 MiB where the system has them: fewer to fill and to look up. Each becomes resident whole,
        so this is for memory that is written from end to end."""
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                self._map.madvise(mmap.MADV_HUGEPAGE)

    def take(self, nbytes: int) -> torch.Tensor:
        """The next ``nbytes`` bytes as a flat uint8 tensor, aligned to a cache line. Raises BudgetError when full."""
        start = align(self.used)
        if start + nbytes > self.capacity:
            raise BudgetError(
                f"an arena of {format_bytes(self.capacity)} has no room for {format_bytes(nbytes)} more",
                "This is a mistake in the plan, not in your input: please report it with --debug.",
            )
        self.used = start + nbytes
        return self.view(start, (nbytes,))

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor over the bytes at ``offset``; ``dtype`` defaults to uint8. The arena lives as long as the view."""
        import torch

        dtype = dtype or torch.uint8
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(shape)

    def resident(self) -> int:
        """Bytes of it that are in memory now, as the operating system says; on systems that do not say, those handed
        out."""
        if sys.platform != "linux":
            return self.used
        states = ctypes.create_string_buffer(ASKED_AT_ONCE // PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        libc = ctypes.CDLL(None, use_errno=True)
        pages = 0
        for start in range(0, self.capacity, ASKED_AT_ONCE):
            length = min(ASKED_AT_ONCE, self.capacity - start)
            if libc.mincore(ctypes.c_void_p(address + start), ctypes.c_size_t(length), states):
                raise OSError(ctypes.get_errno(), "mincore failed")
            pages += states.raw[: length // PAGE].count(1)  # a byte for each page, 1 where it is in memory
        return pages * PAGE

    def release(self) -> None:
        """Give the pages back to the operating system; the mapping and its views stay valid and read as zeros."""
        self._map.madvise(mmap.MADV_DONTNEED)


class Workspace:
    """Scratch memory as a stack on an arena: ``empty`` pushes, leaving a ``frame`` pops.

    The decoder takes every temporary tensor whose size grows with tokens or context from here. Running the same code
    with :func:`tightfit.kernels.ops.dry` on an unwritten arena gives ``high_water``, the exact bytes that a step needs,
    without computing anything.
    """

    def __init__(self, arena: Arena) -> None:
        import torch

        self.arena = arena
        self.top = 0
        self.high_water = 0
        # Tensors are kept: a decoding step takes the same ones at the same places as the step before, and making one
        # takes longer than a small operation. Those made in inference mode cannot be written to outside of it.
        self._kept: dict[tuple[Any, ...], tuple[int, Any]] = {}
        self._inference = torch.is_inference_mode_enabled

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An uninitialised tensor of ``shape``; ``dtype`` defaults to float32. Valid until the enclosing frame ends."""
        key = (self.top, shape, dtype, self._inference())
        known = self._kept.get(key)
        if known is None:
            import torch

            kind = dtype or torch.float32
            start, end = self._place(math.prod(shape) * kind.itemsize)
            known = self._keep(key, end, self.arena.view(start, shape, kind))
        self.top = known[0]
        if self.top > self.high_water:
            self.high_water = self.top
        tensor: torch.Tensor = known[1]
        return tensor

    def columns(self, rows: int, *shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """An uninitialised float32 tensor (rows, features), and views (rows, *shape) of its columns, side by side: what
        matrices give that are multiplied with the same input."""
        key = (self.top, rows, shapes, self._inference())
        known = self._kept.get(key)
        if known is None:
            import torch

            widths = [math.prod(shape) for shape in shapes]
            start, end = self._place(4 * rows * sum(widths))
            whole = self.arena.view(start, (rows, sum(widths)), torch.float32)
            parts = [part.unflatten(1, shape) for part, shape in zip(whole.split(widths, dim=1), shapes, strict=True)]
            known = self._keep(key, end, (whole, *parts))
        self.top = known[0]
        if self.top > self.high_water:
            self.high_water = self.top
        tensors: tuple[torch.Tensor, ...] = known[1]
        return tensors

    def _place(self, nbytes: int) -> tuple[int, int]:
        """Where the next ``nbytes`` bytes start and end."""
        start = align(self.top)
        if start + nbytes > self.arena.capacity:
            raise BudgetError(
                f"the workspace of {format_bytes(self.arena.capacity)} is too small for {format_bytes(nbytes)} more",
                "This is a mistake in the plan, not in your input: please report it with --debug.",
            )
        return start, start + nbytes

    def _keep(self, key: tuple[Any, ...], end: int, value: Any) -> tuple[int, Any]:
        if len(self._kept) >= KEPT_VIEWS:
            self._kept.clear()
        self._kept[key] = end, value
        return end, value

    def frame(self) -> Frame:
        """Everything taken inside is given back at the end."""
        return Frame(self)


class Frame:
    """``with`` it, what is taken from a workspace is given back at the end (contextlib's manager takes longer)."""

    __slots__ = ("_top", "_ws")

    def __init__(self, ws: Workspace) -> None:
        self._ws = ws

    def __enter__(self) -> Workspace:
        self._top = self._ws.top
        return self._ws

    def __exit__(self, *error: object) -> None:
        self._ws.top = self._top


@dataclass
class Account:
    """One line of the ledger, in bytes."""

    reserved: int = 0
    peak: int = 0


@dataclass
class Ledger:
    """The accounts of one process under one budget (bytes).

    ``reserve`` refuses before anything is allocated; ``record`` notes what an account really used.
    """

    budget: int
    accounts: dict[str, Account] = field(default_factory=lambda: {name: Account() for name in ACCOUNTS})
    _arenas: list[tuple[str, Arena]] = field(default_factory=list)

    @property
    def reserved(self) -> int:
        return sum(account.reserved for account in self.accounts.values())

    @property
    def free(self) -> int:
        return self.budget - self.reserved

    def reserve(self, account: str, nbytes: int) -> None:
        """Promise ``nbytes`` more to ``account``. Raises BudgetError, and changes nothing, if the budget is
        exceeded."""
        if nbytes > self.free:
            raise BudgetError(
                f"{format_bytes(nbytes)} for '{account}' exceed what is left of the budget, {format_bytes(self.free)} "
                f"of {format_bytes(self.budget)}",
                f"A budget of {format_bytes(self.reserved + nbytes)} would hold it.",
                smallest_bytes=self.reserved + nbytes,
            )
        self.accounts[account].reserved += nbytes

    def arena(self, account: str, nbytes: int) -> Arena:
        """Reserve and map ``nbytes`` for ``account``."""
        nbytes = align(nbytes, PAGE)
        self.reserve(account, nbytes)
        arena = Arena(nbytes)
        self._arenas.append((account, arena))
        return arena

    def release(self) -> None:
        """Gives the memory of all arenas back; what is left of it reads as zeros."""
        for _, arena in self._arenas:
            arena.release()

    def measure(self, resident: int) -> None:
        """Notes what each account uses now, given the resident set of the process: what is in no arena belongs to
        ``runtime``."""
        used = dict.fromkeys(ACCOUNTS, 0)
        for name, arena in self._arenas:
            used[name] += arena.resident()
        used["runtime"] = resident - sum(used.values())
        for name, nbytes in used.items():
            self.note(name, nbytes)

    def note(self, account: str, nbytes: int) -> None:
        """Notes that ``account`` used ``nbytes`` at some moment; the largest is kept."""
        self.accounts[account].peak = max(self.accounts[account].peak, nbytes)

    def receipt(self) -> dict[str, Any]:
        """``{account: {"reserved_bytes", "peak_bytes"}}`` for the accounts that were used."""
        return {
            name: {"reserved_bytes": account.reserved, "peak_bytes": account.peak}
            for name, account in self.accounts.items()
            if account.reserved or account.peak
        }
