"""Blocks of linear layers as users write them, and what stands around them."""

from typing import Any

import torch
from network_blocks import Draw, Shape, block, linear, shaken
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint


@block("rows", "tokens")
class Plain(nn.Module):
    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        width = draw.pick("width", 12, 16, 33)
        self.fc = linear(shape[-1], width, bias=draw.pick("bias", True, False))
        self.act = draw.pick("act", nn.ReLU(inplace=True), nn.GELU(), nn.Tanh(), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))


@block("rows")
class WithBatchNorm(nn.Module):
    """A BatchNorm after the layer, before it, after two layers, read, or with its layer's output used twice."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.where = draw.pick("where", "after", "before", "shared", "read", "output used twice", "both sides", "twice")
        self.fc, self.second = linear(shape[-1], shape[-1]), linear(shape[-1], shape[-1])
        self.norm = shaken(nn.BatchNorm1d(shape[-1], affine=draw.pick("affine", True, True, False)))

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "before":
            return self.fc(self.norm(x))
        if self.where == "shared":
            return torch.relu(self.norm(self.fc(x))) + self.norm(self.second(x))
        if self.where == "read":
            return self.norm(self.fc(x)) + self.norm.running_mean
        if self.where == "output used twice":
            h = self.fc(x)
            return self.norm(h) - h.tanh()
        if self.where == "both sides":
            return self.second(self.norm(self.fc(x)))
        if self.where == "twice":
            return self.norm(self.norm(self.fc(x)))
        return self.norm(self.fc(x))


@block("rows", "tokens")
class Residual(nn.Module):
    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape[-1])
        self.up, self.down = linear(shape[-1], 2 * shape[-1]), linear(2 * shape[-1], shape[-1])
        self.first = draw.pick("norm", "before", "after")

    def forward(self, x: Tensor) -> Tensor:
        if self.first == "before":
            return x + self.down(F.gelu(self.up(self.norm(x))))
        return self.norm(x + self.down(F.relu(self.up(x))))


@block("rows", "tokens")
class Concatenation(nn.Module):
    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({"a": linear(shape[-1], 8), "b": linear(shape[-1], 12)})
        self.out = linear(20, shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([branch(x).relu() for branch in self.branches.values()], -1))


@block("rows", "tokens")
class Hooked(nn.Module):
    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.fc = linear(shape[-1], shape[-1])
        how = draw.pick("hook", "after", "before", "keywords", "both")
        if how in ("after", "both"):
            self.fc.register_forward_hook(lambda module, args, output: 2 * output + args[0].mean())
        if how in ("before", "both"):
            self.fc.register_forward_pre_hook(lambda module, args: (args[0] * 1.5 - 0.3,))
        if how == "keywords":
            self.fc.register_forward_pre_hook(lambda m, args, kwargs: ((args[0].abs(),), kwargs), with_kwargs=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class _Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = linear(width, width)

    def forward(self, x: Tensor, skip: Tensor | None = None, *, gain: float = 1.0) -> dict[str, Any]:
        h = self.fc(input=x) * gain
        return {"main": h if skip is None else h + skip, "aux": (h, None)}


@block("rows", "tokens")
class Arguments(nn.Module):
    """Optional and keyword arguments, answers in a dictionary."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.first, self.second = _Gated(shape[-1]), _Gated(shape[-1])
        self.gain = draw.pick("gain", 1.0, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)["main"]
        return self.second(h, skip=x, gain=self.gain)["main"].tanh() + self.second(x=h)["aux"][0]


@block("rows", "tokens")
class Branching(nn.Module):
    """Control flow on shapes, and on values that rounding does not carry over a threshold."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.a, self.b = linear(shape[-1], shape[-1]), linear(shape[-1], shape[-1])
        self.on = draw.pick("on", "batch", "mean", "largest", "loop", "assert", "masked rows")

    def forward(self, x: Tensor) -> Tensor:
        if self.on == "batch":
            return self.a(x) if x.shape[0] > 6 else self.b(x)
        if self.on == "mean":
            return self.a(x) if x.abs().mean() > 0.01 else self.b(x).relu()
        if self.on == "largest":
            return self.a(x) / max(1.0, x.abs().max().item())
        if self.on == "loop":
            for _ in range(x.shape[0] % 3 + 1):
                x = torch.tanh(self.a(x))
            return x
        if self.on == "masked rows":
            every_second = torch.arange(x.shape[0]) % 2 == 0
            y = self.b(x)
            y[every_second] = self.a(x[every_second])
            return y
        assert bool(torch.isfinite(x).all())
        return self.a(x)


@block("rows", "tokens")
class OtherDtype(nn.Module):
    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.fc, self.out = linear(shape[-1], shape[-1]), linear(shape[-1], shape[-1])
        self.how = draw.pick("how", "double layer", "bfloat16 layer", "double between")
        if self.how != "double between":
            self.fc.to(torch.double if self.how == "double layer" else torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x) if self.how == "double between" else self.fc(x.to(self.fc.bias.dtype))
        return self.out(torch.tanh(h.double()).to(x.dtype))


@block("rows", "tokens")
class InPlace(nn.Module):
    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.a, self.b = linear(shape[-1], shape[-1]), linear(shape[-1], shape[-1])
        self.how = draw.pick("how", "relu_", "add_", "input afterwards", "index")

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.how == "relu_":
            return self.b(h.relu_()).add_(1)
        if self.how == "add_":
            h += x
            return self.b(h)
        if self.how == "input afterwards":
            y = self.b(h)
            h.mul_(0).add_(0.5)
            return y + h
        h[..., 0] = 0.0
        return self.b(h)


@block("rows", "tokens")
class Checkpointed(nn.Module):
    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.inner = nn.Sequential(linear(shape[-1], shape[-1]), nn.ReLU(), linear(shape[-1], shape[-1]))
        self.reentrant = draw.pick("reentrant", False, True)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@block("rows", "tokens")
class OddRows(nn.Module):
    """No rows, a single row without a batch, rows that are not contiguous."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.fc = linear(shape[-1], shape[-1])
        self.how = draw.pick("how", "none", "one", "strided", "expanded", "flattened")

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "none":
            return torch.cat([self.fc(x), self.fc(x[:0])])
        if self.how == "one":
            return torch.stack([self.fc(row) for row in x])
        if self.how == "strided":
            return self.fc(torch.stack([x, -x], -1)[..., 0].flip(0)).flip(0)
        if self.how == "expanded":
            return self.fc(x[:1].expand_as(x)) + self.fc(x)
        return self.fc(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


@block("rows", "tokens")
class BareParameter(nn.Module):
    """A weight of no layer, a Bilinear, and a layer that is never called."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape[-1], shape[-1]) * shape[-1] ** -0.5)
        self.unused, self.fc = linear(7, 5), linear(shape[-1], shape[-1])
        self.bilinear = nn.Bilinear(shape[-1], shape[-1], shape[-1]) if draw.pick("bilinear", True, False) else None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x @ self.weight)
        return self.fc(h) if self.bilinear is None else self.fc(h + 0.3 * self.bilinear(h, x))
