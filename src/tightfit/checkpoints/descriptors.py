"""Files that stay open, of which a model may have hundreds: more than a process may have open unless it asks."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import suppress

SPARE = 12  # descriptors for what is open for a moment: libraries that are imported, pipes to a child


def limit() -> int:
    """How many files this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def keep_open(path: str | os.PathLike[str], flags: int) -> int:
    """As :func:`os.open`, for a file that stays open. Where descriptors become scarce the process raises its limit as
    far as the system lets it; raises OSError (EMFILE) rather than taking the last ones."""
    descriptor = os.open(path, flags)
    if descriptor + SPARE >= limit():
        _raise_limit()
    if descriptor + SPARE >= limit():
        os.close(descriptor)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
    return descriptor


def _raise_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * soft if hard == resource.RLIM_INFINITY else min(2 * soft, hard)
    with suppress(OSError, ValueError):  # macOS has another limit beside
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
