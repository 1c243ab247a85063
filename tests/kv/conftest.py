from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.kv.driver import Tiny


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models are tiny: more threads only cost time."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """Makes a model of :data:`tests.kv.driver.CONFIGS`, once for each type of the cache."""
    made: dict[tuple[str, torch.dtype], Tiny] = {}

    def get(name: str = "llama", dtype: torch.dtype = torch.float32) -> Tiny:
        if (name, dtype) not in made:
            made[name, dtype] = Tiny.make(name, dtype, tmp_path_factory.mktemp(name))
        return made[name, dtype]

    return get
