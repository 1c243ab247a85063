"""Machine code that only ran while libraries were imported need not stay resident.

Importing torch touches about 70 MiB of code that a decoder never runs again. The pages are a copy of the library's
file: given back, they cost nothing until they are run again, and then a read from the page cache.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

MADV_DONTNEED = 4
MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-xp \S+ \S+ ([1-9][0-9]*)\s")


def drop_code_pages(maps: Path = Path("/proc/self/maps")) -> None:
    """Gives back every page of executable code that is mapped from a file; those in use come back as they are run.

    Only mappings that cannot be written are touched, so nothing is lost. Does nothing where the system does not list
    mappings.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for line in maps.read_text().splitlines():
        match = MAPPING.match(line)
        if match:
            start, end = int(match[1], 16), int(match[2], 16)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
