import pytest
import torch

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import cpu


@pytest.fixture(params=cpu.supported())
def kernels(request):
    """Every kind of kernels that this machine can run, one after the other."""
    before = cpu.features()["chosen"]
    cpu.use(request.param)
    yield request.param
    cpu.use(before)


@pytest.fixture
def ws():
    return Workspace(Arena(64 << 20))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
