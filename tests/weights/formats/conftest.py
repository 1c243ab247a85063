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
def settings():
    """The same numbers in each run; and one thread, since these tensors are too small to share."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
