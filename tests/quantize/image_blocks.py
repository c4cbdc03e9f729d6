"""Blocks of 2d convolutions as users write them."""

from collections.abc import Callable
from typing import Any

import torch
from network_blocks import Draw, Shape, block, evenly, linear, shaken
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, prune


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return evenly(nn.Conv2d(inputs, outputs, size, **options))


@block("images")
class PlainConv(nn.Module):
    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.conv = conv(
            shape[0],
            draw.pick("channels", 8, 12, 16) if shape[0] % 4 else 16,
            draw.pick("size", 1, 3, (3, 2)),
            padding=draw.pick("padding", 1, "same", 0, (0, 1)),
            dilation=draw.pick("dilation", 1, 1, 2),
            groups=draw.pick("groups", 1, 4) if shape[0] % 4 == 0 else 1,
            padding_mode=draw.pick("mode", "zeros", "zeros", "reflect", "replicate", "circular"),
            bias=draw.pick("bias", True, False),
        )
        self.act = draw.pick("act", nn.ReLU(inplace=True), nn.SiLU(), nn.Hardswish(), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


@block("images")
class Strided(nn.Module):
    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.conv = conv(shape[0], 16, 3, stride=draw.pick("stride", 2, (2, 1)), padding=1)
        self.pool = draw.pick("pool", nn.Identity(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(torch.relu(self.conv(x)))


@block("images")
class ConvBatchNorm(nn.Module):
    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        c = shape[0]
        self.where = draw.pick("where", "after", "before", "shared", "read", "output used twice", "pooled", "optional")
        self.conv, self.second = conv(c, c, padding=1), conv(c, c, padding=1, bias=False)
        self.norm = shaken(nn.BatchNorm2d(c, affine=draw.pick("affine", True, True, False)))
        self.last = shaken(nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.inner(x)))

    def inner(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.where == "before":
            return self.conv(self.norm(x).relu())
        if self.where == "shared":
            return self.norm(self.conv(x)).relu() + self.norm(self.second(x))
        if self.where == "read":
            return self.norm(self.conv(x.to(self.norm.running_var.dtype)))
        if self.where == "output used twice":
            h = self.conv(x)
            return self.norm(h) + h
        if self.where == "pooled":
            return self.norm(F.avg_pool2d(self.conv(x), 3, 1, 1))
        if self.where == "optional":
            h = self.conv(x)
            return self.norm(h) + (h if skip is None else skip)
        return F.relu(self.norm(self.conv(x)))


@block("images")
class Bottleneck(nn.Module):
    """Residual sums, a depthwise convolution, squeeze and excitation."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        c = shape[0]
        self.expand, self.norm = conv(c, 2 * c, 1, bias=False), shaken(nn.BatchNorm2d(2 * c))
        self.depthwise = conv(2 * c, 2 * c, 3, padding=1, groups=2 * c)
        self.squeeze, self.excite = conv(2 * c, 4, 1), conv(4, 2 * c, 1)
        self.project = conv(2 * c, c, 1)
        self.gated = draw.pick("gated", True, False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.depthwise(F.relu6(self.norm(self.expand(x)))))
        if self.gated:
            h = h * torch.sigmoid(self.excite(F.relu(self.squeeze(h.mean((2, 3), keepdim=True)))))
        return x + self.project(h)


@block("images")
class Dense(nn.Module):
    """Concatenations along channels, a shuffle of them, a split."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.a, self.b = conv(shape[0], 4, padding=1), conv(shape[0] + 4, 4, padding=1)
        self.shuffled = draw.pick("shuffled", True, False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.a(x).relu()], 1)
        x = torch.cat([x, self.b(x).relu_()], 1)
        if self.shuffled:
            n, c, h, w = x.shape
            x = x.view(n, c // 4, 4, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
            left, right = x.chunk(2, 1)
            x = torch.cat([right, left], 1)
        return x


@block("images")
class Viewed(nn.Module):
    """Views after a convolution that expect its answer to be contiguous, as torch's is for contiguous inputs."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.conv, self.tokens = conv(shape[0], 16, padding=1), linear(16, 16)
        self.how = draw.pick("how", "tokens", "last", "flat", "strides", "in place")

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.contiguous())
        n, c, height, width = h.shape
        if self.how == "tokens":
            return self.tokens(h.view(n, c, -1).transpose(1, 2)).transpose(1, 2).reshape(h.shape)
        if self.how == "last":
            return self.tokens(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.how == "flat":
            return (h.view(-1) * 2).view(n, c, height, width)
        if self.how == "strides":
            return torch.as_strided(h, (n, c, height * width), (c * height * width, height * width, 1)).view(h.shape)
        h.view(n, -1)[:, 0] = 1.0
        return h.relu_()


class _Standardized(nn.Conv2d):
    """Weight standardization (Qiao et al., 2019)."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight / weight.std((1, 2, 3), keepdim=True), self.bias) * 0.1


class _SamePadding(nn.Conv2d):
    """Pads as TensorFlow does, then calls its base."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 2, 0, 2)))


@block("images")
class OwnConv(nn.Module):
    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        c = shape[0]
        kinds: dict[str, Callable[[], nn.Module]] = {
            "standardized": lambda: evenly(_Standardized(c, c, 3, padding=1)),
            "pads itself": lambda: evenly(_SamePadding(c, c, 3)),
            "pruned": lambda: prune.ln_structured(conv(c, c, padding=1), "weight", 0.3, n=2, dim=0),
            "weight_norm": lambda: parametrizations.weight_norm(conv(c, c, padding=1)),
            "spectral_norm": lambda: parametrizations.spectral_norm(conv(c, c, padding=1)).eval(),
            "transposed": lambda: nn.ConvTranspose2d(c, c, 3, padding=1),
            "pruned with BatchNorm": lambda: nn.Sequential(
                prune.l1_unstructured(conv(c, c, padding=1), "weight", 0.3), shaken(nn.BatchNorm2d(c))
            ),
            "weight_norm with BatchNorm": lambda: nn.Sequential(
                parametrizations.weight_norm(conv(c, c, padding=1)), shaken(nn.BatchNorm2d(c))
            ),
        }
        self.own = kinds[draw.pick("kind", *kinds)]()
        self.conv = conv(c, c, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.own(x).relu())


@block("images")
class ConvRead(nn.Module):
    """The weight is read, the layer is called twice, with a keyword, without a batch, behind a hook, from a list."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.conv, self.norm = conv(shape[0], shape[0], padding=1), shaken(nn.BatchNorm2d(shape[0]))
        self.how = draw.pick("how", "dtype", "value", "twice", "keyword", "one image", "hook", "list", "no images")
        self.steps = [self.conv, self.norm]
        if self.how == "hook":
            self.conv.register_forward_hook(lambda module, args, output: output * 3 + 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "dtype":
            return self.norm(self.conv(x.to(self.conv.weight.dtype)))
        if self.how == "value":
            return F.conv2d(x, self.conv.weight, self.conv.bias, padding=1) + self.conv(x)
        if self.how == "twice":
            return self.norm(self.conv(self.conv(x).relu()))
        if self.how == "keyword":
            return self.norm(input=self.conv(input=x))
        if self.how == "one image":
            return torch.stack([self.conv(image) for image in x])
        if self.how == "list":
            for step in self.steps:
                x = step(x)
            return x
        if self.how == "no images":
            return torch.cat([self.conv(x), self.conv(x[:0])])
        return self.norm(self.conv(x))


@block("images")
class Layouts(nn.Module):
    """Channels last, other sizes, maps that are not contiguous, control flow on them."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.conv, self.other = conv(shape[0], shape[0], padding=1), conv(shape[0], shape[0], padding=1)
        self.how = draw.pick("how", "channels_last", "upsampled", "sliced", "expanded", "size", "value", "double")
        if self.how == "double":
            self.conv.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "channels_last":
            return self.conv(x.contiguous(memory_format=torch.channels_last)).relu()
        if self.how == "upsampled":
            return self.other(F.interpolate(self.conv(x), scale_factor=2, mode="nearest"))
        if self.how == "sliced":
            return self.conv(torch.cat([x, -x], -1)[..., ::2])
        if self.how == "expanded":
            return self.conv(x.mean((2, 3), keepdim=True).expand_as(x)) + self.other(x)
        if self.how == "size":
            return self.conv(x) if x.shape[0] > 6 else self.other(x).relu()
        if self.how == "value":
            return self.conv(x) if x.abs().mean() > 0.01 else self.other(x).tanh()
        return self.other(self.conv(x.double()).float())
