"""Settings of the memory allocators under us, so that freed buffers go back and what libraries keep is bounded.

Measured with torch 2.13, glibc 2.36 and two threads:

- glibc raises its mmap threshold to the size of the largest buffer that was freed (up to 32 MiB); later buffers of that
  size then sit in the heap, where one small allocation above them keeps them resident: 83 MiB remain after a loop that
  holds 1 MiB, and 3 MiB with the thresholds fixed. Mapping a buffer, or trimming the heap at every free, costs page
  faults, so the thresholds are above the usual temporaries of a step: those of 0.5 MiB are ten times faster than with
  the 128 KiB that glibc starts with.
- oneDNN keeps the code that it compiled for each shape: 104 MiB after 134 bfloat16 products with different numbers of
  rows, and 25 MiB with room for 16 in its cache and in that of ideep above it.
- MKL keeps packing buffers for each thread: 23 MiB after a product of 512 rows, and 15 MiB without them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tightfit.budget.units import KiB, MiB

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
MMAP_THRESHOLD, TRIM_THRESHOLD = 8 * MiB, 8 * MiB
LARGE_BLOCK = 256 * KiB

# Read by the libraries when torch is imported. A value that the user has set stays.
ENVIRONMENT = {
    "GOMP_SPINCOUNT": "10000",  # about 100 microseconds between operations: prefill is a third faster than without
    "LRU_CACHE_CAPACITY": "16",  # ideep's cache of oneDNN primitives: layers of a decoder share a few shapes
    "MKL_DISABLE_FAST_MM": "1",
    "OMP_WAIT_POLICY": "passive",  # costs no memory; spinning workers would take the cores from our own kernels
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
}


def tune_malloc() -> bool:
    """Bound what allocators keep. To be called first thing in a process, before torch is imported.

    Returns whether the allocator could be tuned: only glibc's has these settings. The environment is set in any case.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    libc = _glibc()
    if libc is None:
        return False
    settings = (_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, TRIM_THRESHOLD)
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in settings)


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """While inside, blocks of 256 KiB and more are mapped one by one and go back to the operating system when they are
    freed: threads that take and free them in turn would leave holes in the heap, several times what they hold."""
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def trim() -> bool:
    """Give free pages of the heap back to the operating system. Returns whether any were given back."""
    libc = _glibc()
    return libc is not None and libc.malloc_trim(0) == 1


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
