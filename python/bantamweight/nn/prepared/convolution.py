"""nn.Conv1d as an nn.Conv2d over images of height one."""

from typing import Any, Self

from torch import Tensor, nn

from .base import PreparedModule, bare, conv2d, parameter


class PreparedConv1d(PreparedModule, nn.Conv1d):
    """`nn.Conv1d` whose weight is its child `conv`, an nn.Conv2d of kernel (1, k).

    Example:
        >>> import torch
        >>> PreparedConv1d.prepare(nn.Conv1d(4, 8, 3))(torch.randn(2, 4, 10)).shape
        torch.Size([2, 8, 8])
    """

    kind = "conv1d"
    replaces = nn.Conv1d
    conv: nn.Conv2d

    @classmethod
    def why_not(cls, module: nn.Conv1d) -> str | None:
        if type(module)._conv_forward is not nn.Conv1d._conv_forward:
            return f"its class {type(module).__name__} convolves in a way of its own"
        return None

    @classmethod
    def prepare(cls, module: nn.Conv1d) -> Self:
        new: Any = bare(cls, module)
        new.conv = conv2d(
            parameter(module.weight.unsqueeze(2), like=module.weight),
            module.bias,
            stride=(1, module.stride[0]),
            padding=module.padding if isinstance(module.padding, str) else (0, module.padding[0]),
            dilation=(1, module.dilation[0]),
            groups=module.groups,
            padding_mode=module.padding_mode,
        )
        return new

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.conv.weight.squeeze(2)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.conv.bias

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input.unsqueeze(-2)).squeeze(-2)
