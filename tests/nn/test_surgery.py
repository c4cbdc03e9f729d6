"""become and replace: everyone who holds a layer sees the new one."""

import copy

import pytest
import torch
from bantamweight.errors import UnsupportedLayerError
from bantamweight.nn.surgery import become, replace
from torch import nn


def test_become_keeps_identity_hooks_mode_and_attributes() -> None:
    layer = nn.Linear(4, 3).eval()
    layer.tag = "mine"  # type: ignore[assignment]
    layer.register_forward_hook(lambda module, args, y: y + 1)
    held, new = [layer], nn.Linear(4, 3, bias=False)
    weight = new.weight
    assert become(layer, new) is layer and held[0].weight is weight and held[0].bias is None
    assert layer.tag == "mine" and not layer.training
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), x @ weight.T + 1)
    assert dict(copy.deepcopy(layer).named_parameters()).keys() == {"weight"}


def test_become_another_class_leaves_nothing_of_the_old_parameters() -> None:
    layer = nn.BatchNorm2d(4)
    become(layer, nn.Identity())
    assert type(layer) is nn.Identity and not layer.state_dict() and layer.num_features == 4


def test_become_refuses_slots() -> None:
    class Narrow(nn.Linear):
        __slots__ = ("extra",)

    layer = Narrow(2, 2)
    with pytest.raises(UnsupportedLayerError, match="Narrow cannot become"):
        become(layer, nn.Identity())
    assert isinstance(layer, Narrow) and layer.weight.shape == (2, 2)


def test_replace_sets_every_name() -> None:
    inner = nn.Linear(2, 2)
    net = nn.ModuleDict({"a": inner, "b": nn.Sequential(inner, nn.ReLU())})
    around = nn.Sequential(inner)
    assert replace(net, inner, around) is net
    assert net["a"] is around and net["b"][0] is around and around[0] is inner
    assert replace(inner, inner, around) is around
