"""Blocks whose layers are shared, held in Python objects, read, or kinds of the user's own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from network_blocks import Draw, Shape, block, evenly, linear
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm


@block("rows", "tokens")
class Shared(nn.Module):
    """One layer called at two places, or held under two names."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.fc = linear(shape[-1], shape[-1])
        self.how = draw.pick("how", "called twice", "two names", "one weight")
        self.again: nn.Module = self.fc
        self.between = linear(shape[-1], shape[-1])
        if self.how == "one weight":
            self.again = linear(shape[-1], shape[-1])
            self.again.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(self.fc(x).relu())
        return h + (self.fc(h) if self.how == "called twice" else self.again(h)).tanh()


@block("rows", "tokens")
class HeldElsewhere(nn.Module):
    """Layers that are called through Python containers and functions beside their registered names."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.a, self.b = linear(shape[-1], shape[-1]), linear(shape[-1], shape[-1])
        how = draw.pick("how", "list", "dict", "tuple", "nested", "method", "lambda", "partial", "unregistered")
        a, b = self.a, self.b
        self.steps: Any = {
            "list": [a, b],
            "dict": {"a": a, "b": b},
            "tuple": (a, b),
            "nested": [{"pair": (a, [b])}],
            "method": [a.forward, b.__call__],
            "lambda": [lambda x: a(x), lambda x: b(x)],
            "partial": [functools.partial(a), functools.partial(nn.Module.__call__, b)],
            "unregistered": [a, b, linear(shape[-1], shape[-1])],
        }[how]

    def forward(self, x: Tensor) -> Tensor:
        for step in self._flat(self.steps):
            x = torch.tanh(step(x))
        return x

    def _flat(self, held: Any) -> list[Any]:
        if isinstance(held, dict):
            return [step for part in held.values() for step in self._flat(part)]
        return [step for part in held for step in self._flat(part)] if isinstance(held, list | tuple) else [held]


@block("rows", "tokens")
class WeightRead(nn.Module):
    """The forward pass reads the layer's weight, its dtype, its shape or its device."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.fc, self.other = linear(shape[-1], shape[-1]), linear(shape[-1], shape[-1])
        self.how = draw.pick(
            "what", "dtype", "shape", "first parameter", "device", "value", "norm", "attributes", "data"
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.other(x)
        if self.how == "dtype":
            return self.fc(x.to(self.fc.weight.dtype))
        if self.how == "shape":
            return self.fc(x).reshape(*x.shape[:-1], self.fc.weight.shape[0])
        if self.how == "first parameter":
            return self.fc(x.to(next(self.parameters()).dtype))
        if self.how == "device":
            return self.fc(x.to(self.fc.weight.device, self.fc.bias.dtype))
        if self.how == "value":
            return F.linear(x, self.fc.weight, self.fc.bias) + self.fc(x)
        if self.how == "norm":
            return self.fc(x) / self.fc.weight.norm(dim=1)
        if self.how == "attributes":
            return self.fc(x).view(*x.shape[:-1], self.fc.out_features)[..., : self.fc.in_features]
        return self.fc(x) + x @ self.fc.weight.data.T


class _Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * 1.5, self.bias)


class _Loud(nn.Linear):
    def forward(self, input: Tensor, scale: float = 2.0) -> Tensor:
        return scale * super().forward(input)


class _Renamed(nn.Linear):
    """Computes what its base does."""


def _iterated(layer: nn.Linear) -> nn.Linear:
    """After one call in training mode, where the old spectral_norm finds the norm."""
    layer.train()(torch.zeros(1, layer.in_features))
    return layer.eval()


@block("rows", "tokens")
class OwnLinear(nn.Module):
    """Subclasses of nn.Linear, and layers whose weight is computed."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        width = shape[-1]
        kinds: dict[str, Callable[[], nn.Module]] = {
            "scaled weight": lambda: evenly(_Scaled(width, width)),
            "louder": lambda: evenly(_Loud(width, width)),
            "renamed": lambda: evenly(_Renamed(width, width)),
            "pruned": lambda: prune.l1_unstructured(linear(width, width), "weight", 0.4),
            "weight_norm": lambda: parametrizations.weight_norm(linear(width, width)),
            "old weight_norm": lambda: weight_norm(linear(width, width)),
            "spectral_norm": lambda: parametrizations.spectral_norm(linear(width, width)).eval(),
            "old spectral_norm": lambda: _iterated(spectral_norm(linear(width, width), n_power_iterations=20)),
            "orthogonal": lambda: parametrizations.orthogonal(linear(width, width)),
        }
        self.own = kinds[draw.pick("kind", *kinds)]()
        self.fc = linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.own(x).relu())


@block("rows", "tokens")
class Cached(nn.Module):
    """What a forward pass keeps on self: a lazy table, a dictionary by device and size, a buffer that is put anew."""

    count: Tensor

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.fc = linear(shape[-1], shape[-1])
        self.what = draw.pick("what", "grid", "dictionary", "buffer", "last input", "output", "weight")
        self.grid: Tensor | None = None
        self.by_device: dict[Any, Tensor] = {}
        self.register_buffer("count", torch.zeros(()), persistent=draw.pick("persistent", True, False))

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "grid":
            if self.grid is None or self.grid.shape != x.shape:
                self.grid = torch.linspace(-1, 1, x.numel(), device=x.device).reshape(x.shape)
            return self.fc(x + self.grid)
        if self.what == "dictionary":
            key = (x.device, tuple(x.shape))
            if key not in self.by_device:
                self.by_device[key] = torch.ones_like(x).cumsum(-1) / x.shape[-1]
            return self.fc(x * self.by_device[key])
        if self.what == "buffer":
            self.count = self.count + x.mean()
            return self.fc(x)
        if self.what == "last input":
            self.last = x
            return self.fc(x) + self.last
        if self.what == "output":
            self.kept = [self.fc(x)]
            return self.kept[-1].relu()
        if self.grid is None:
            self.grid = self.fc.weight.detach().clone()
        return self.fc(x) + F.linear(x, self.grid)
