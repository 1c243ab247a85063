from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import product
from typing import get_args

import pytest
from tests.plan import fake_speeds

from tightfit.budget.machine import MachineRecord, usable_cores
from tightfit.plan.schema import ActivationType, GemmType, KvType, Numerics
from tightfit.plan.speeds import speeds_key


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> Iterator[None]:
    """Shells start jobs in the background with Ctrl-C ignored, which children would inherit."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in the user's folder, or found there. Measuring a machine takes a quarter of a minute: it counts
    as measured, but where a test takes another folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIGHTFIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        record = MachineRecord.open()
        for types in product(get_args(GemmType), get_args(ActivationType), get_args(KvType)):
            numerics = Numerics(**dict(zip(("gemm", "activations", "kv"), types, strict=True)))
            for threads in range(1, usable_cores() + 1):
                known = fake_speeds.speeds(threads=threads, numerics=numerics)
                record.speeds[speeds_key(threads, numerics)] = known.model_dump(mode="json")
        record.save()
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first: at the end, one process would be left with them."""
    items.sort(key=lambda item: "memory" not in item.path.parts)
