import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models are tiny: more threads only cost time."""
    torch.set_num_threads(1)
