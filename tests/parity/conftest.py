"""Lets the tests beside it import ``harness``."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports tests by their path, and leaves sys.path alone


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models are tiny: more threads only cost time."""
    torch.set_num_threads(1)
