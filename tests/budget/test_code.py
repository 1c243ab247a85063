"""Code that is not needed is given back, and comes back when it is run."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own: how much code is resident depends on what ran before.
SCRIPT = """
import torch
from tightfit.budget.code import drop_code_pages
from tightfit.budget.meter import resident_set
before = resident_set()
drop_code_pages()
after = resident_set()
product = (torch.eye(3) @ torch.ones(3, 3)).sum().item()
print(before.file - after.file, product)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are listed on Linux")
def test_code_of_the_import_is_given_back_and_torch_still_computes() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    dropped, product = done.stdout.split()
    assert int(dropped) > 30 << 20  # about 65 MiB with torch 2.13
    assert float(product) == 9.0
