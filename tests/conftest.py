"""Helpers beside the tests (``measure``, ``random_model``, the parity harness) are imported by their file names."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
