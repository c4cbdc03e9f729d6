"""What the tests of prepared modules share: a module beside its prepared copy, and when the two are the same."""

import copy
from typing import Any

import torch
from bantamweight.nn.prepare import prepare
from bantamweight.nn.prepared.base import PreparedModule
from torch import nn


def both(module: nn.Module, kind: str) -> tuple[nn.Module, nn.Module]:
    """A module and its prepared copy, in evaluation mode."""
    module.eval()
    prepared = copy.deepcopy(module)
    identity = id(prepared)
    found = prepare(prepared)
    assert found.records[""]["kind"] == kind and not found.left and id(prepared) == identity
    assert isinstance(prepared, PreparedModule) and isinstance(prepared, type(module))
    return module, prepared


def same(first: Any, second: Any, *, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)
