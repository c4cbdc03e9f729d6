"""Weights that hooks compute become plain ones of the same value."""

import copy
from collections.abc import Callable
from typing import Any

import bantamweight as bw
import pytest
import torch
from bantamweight.errors import FormatError
from bantamweight.nn.prepare import prepare, prepare_like
from bantamweight.nn.prepared.settle import settle_like, settle_weights
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, prune


def pruned_twice(module: nn.Module) -> None:
    prune.random_unstructured(module, "weight", 0.3)
    prune.l1_unstructured(module, "weight", 0.2)
    prune.l1_unstructured(module, "bias", 1)


WAYS: dict[str, Callable[[Any], Any]] = {
    "prune": pruned_twice,
    "weight_norm": utils.weight_norm,
    "spectral_norm": utils.spectral_norm,
    "new weight_norm": parametrizations.weight_norm,
    "new spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(3, 4, 3), lambda: nn.Conv1d(3, 4, 3)])
@pytest.mark.parametrize(("gradient", "frozen"), [(True, False), (False, False), (False, True)])
def test_every_way(way: str, make: Callable[[], nn.Module], gradient: bool, frozen: bool) -> None:
    def make_model() -> nn.Module:
        net = nn.Sequential(make(), nn.ReLU())
        WAYS[way](net[0])
        return net

    net = make_model()
    x = torch.randn(2, 6) if isinstance(net[0], nn.Linear) else torch.randn(2, 3, 8, 8)
    x = x[:, :, 0] if isinstance(net[0], nn.Conv1d) else x
    with torch.no_grad():
        net(x)  # in training: a spectral norm has taken a step
        expected = net.eval()(x)
    net.train()
    net[0].requires_grad_(not frozen)
    original = copy.deepcopy(net)
    with torch.set_grad_enabled(gradient):
        settled = settle_weights(net)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad is not frozen for p in net.parameters())
    assert "0.weight" in settled and set(dict(net.named_parameters())) == {"0.weight", "0.bias"}
    assert type(net[0]) in (nn.Linear, nn.Conv2d, nn.Conv1d) and net[0].training and not net[0]._forward_pre_hooks
    assert not settle_weights(net)
    with torch.no_grad():
        torch.testing.assert_close(original.eval()(x), expected)  # a copy shares nothing with the one it came from
    assert settle_weights(original) == settled
    records = prepare(net).records
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), expected)

    fresh = make_model()
    settle_like(fresh, settled)
    prepare_like(fresh, records)
    fresh.load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(x), expected)
    settle_like(fresh, settled if not records else {})  # what is plain stays so


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@torch.no_grad()
def test_recurrent_layers_on_a_meta_model_and_end_to_end() -> None:
    def make_model() -> nn.Module:
        net = nn.ModuleDict({"lstm": nn.LSTM(8, 8), "head": parametrizations.weight_norm(nn.Linear(8, 8))})
        for name in ("weight_ih_l0", "weight_hh_l0"):
            utils.weight_norm(net["lstm"], name)
        net.forward = lambda x: net["head"](net["lstm"](x)[0])  # type: ignore[assignment]
        return net.eval()

    net = make_model()
    x = torch.randn(5, 32, 8)
    expected = net(x)
    settled, records = settle_weights(net), prepare(net).records
    assert set(settled) == {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"} and set(records) == {"lstm"}
    torch.testing.assert_close(net(x), expected)
    with torch.device("meta"):
        fresh = make_model()
    settle_like(fresh, settled)
    prepare_like(fresh, records)
    fresh.load_state_dict(net.state_dict(), assign=True)
    torch.testing.assert_close(fresh(x), expected)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = net["lstm"], net["head"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[0])

    small = bw.quantize(Net(), bw.GPFQ(bits=8), calibration=[x], progress=False)
    assert {layer.name for layer in small.quantization.layers} == {"lstm.input_l0", "lstm.hidden_l0", "head"}


def test_a_file_of_another_model_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    for name in ("1.weight", "0.gain", "weight"):
        with pytest.raises(FormatError, match=f"'{name}', which Sequential lacks"):
            settle_like(net, {name: "prune"})
    before = copy.deepcopy(net.state_dict())
    settle_like(net, {"0.weight": "prune"})
    assert torch.equal(net[0].weight, before["0.weight"])
