"""What blocks of networks are made with: random choices that are remembered, and layers whose errors show.

A block is an nn.Module made from (`draw`, `shape`): its choices, and the shape of its input without the batch. It is
registered for the families of inputs it takes: rows [d], tokens [t, d], images [c, h, w]. Every block computes a
function of its input alone, however often it was called before.
"""

import random
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

Shape = tuple[int, ...]
BLOCKS: dict[str, dict[str, Any]] = {"rows": {}, "tokens": {}, "images": {}}
Block = TypeVar("Block", bound=type[nn.Module])


def block(*families: str) -> Callable[[Block], Block]:
    def register(kind: Block) -> Block:
        for family in families:
            BLOCKS[family][kind.__name__] = kind
        return kind

    return register


class Draw:
    """Random choices that remember what was chosen."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.chosen: dict[str, Any] = {}
        torch.manual_seed(self.random.getrandbits(32))

    def pick(self, what: str, *choices: Any) -> Any:
        self.chosen[what] = self.random.choice(choices)
        return self.chosen[what]

    def __str__(self) -> str:
        return ", ".join(f"{what}={value}" for what, value in self.chosen.items())


def evenly(layer: Any) -> Any:
    """Weights that keep the size of their inputs, and a bias: errors then neither grow nor vanish with depth."""
    with torch.no_grad():
        layer.weight.normal_(0, layer.weight[0].numel() ** -0.5)
        if layer.bias is not None:
            layer.bias.normal_(0, 0.2)
    return layer


def linear(inputs: int, outputs: int, **options: Any) -> nn.Linear:
    return evenly(nn.Linear(inputs, outputs, **options))


def shaken(norm: Any) -> Any:
    """A BatchNorm in evaluation mode whose folding shows."""
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.5)
        norm.running_var.uniform_(0.4, 2.5)
        if norm.affine:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
    return norm.eval()


def evenly_table(rows: int, width: int) -> nn.Embedding:
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, 0, width**-0.5)
    return table
