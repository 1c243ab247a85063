"""Our methods keep what those of kvpress keep: the checks of kvpress_checks.py, in a process of their own.

Importing kvpress changes the attention of transformers, which other tests compare with, and takes several hundred
megabytes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.measure import run_measured

CHECKS = Path(__file__).with_name("kvpress_checks.py")
ROOT = Path(__file__).parents[2]


def test_methods_keep_what_those_of_kvpress_keep() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CHECKS]
    done = run_measured(command, cwd=ROOT, timeout=300)
    assert done.exit_code == 0, done.stdout
    assert re.search(r"\b11 passed\b", done.stdout), done.stdout
