"""Models of tens of files open where a process may have few files open, or are refused with the limit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests import tiny_llama

CODE = """
import json, resource, sys
soft, hard = map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
import os
from tightfit.checkpoints.checkpoint import open_checkpoint
from tightfit.errors import CheckpointError
try:
    with open_checkpoint(sys.argv[1]) as checkpoint:
        for info in checkpoint.tensors.values():
            checkpoint.read_into(info, 0, bytearray(info.nbytes))
        left = [os.dup(0) for _ in range(12)]  # what others need is free
    print(json.dumps({"tensors": len(checkpoint.tensors)}))
except CheckpointError as error:
    print(json.dumps({"error": error.message, "hint": error.hint}))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in 40 files."""
    return tiny_llama.write(tmp_path_factory.mktemp("shards") / "model", shards=40, layers=5)


def opened(folder: Path, soft: int, hard: int) -> dict[str, str | int]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder), str(soft), str(hard)], capture_output=True, text=True, check=True
    )
    answer: dict[str, str | int] = json.loads(done.stdout)
    return answer


def test_tens_of_files_open_and_can_be_read(shards: Path) -> None:
    assert opened(shards, 1024, 1024) == {"tensors": 48}


@pytest.mark.parametrize(
    ("soft", "hard"), [(32, 1024), (24, 60)]
)  # 40 descriptors, and as many for direct reads or not
def test_a_limit_that_may_be_raised_is_raised(shards: Path, soft: int, hard: int) -> None:
    assert opened(shards, soft, hard) == {"tensors": 48}


def test_a_limit_that_may_not_be_raised_is_named(shards: Path) -> None:
    refused = opened(shards, 32, 32)
    assert "this process may have 32 files open" in str(refused["error"])
    assert "ulimit -n" in str(refused["hint"])
