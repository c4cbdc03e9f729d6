import pytest
import torch
from small_networks import network
from torch.nn import functional


@pytest.fixture(autouse=True)
def one_thread():
    """These networks are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["mlp", "conv", "attention"])
def case(request):
    """(model, loss_fn, data) of each kind of network."""
    model, data = network(request.param)
    return model, functional.cross_entropy, data
