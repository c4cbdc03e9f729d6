"""Layers that are nn.Linear in another dress: transformers' Conv1D, and nn.Bilinear."""

from typing import Any, Self

from torch import Tensor, nn

from .base import PreparedModule, bare, linear, parameter


class PreparedTransposedLinear(PreparedModule):
    """transformers' ``Conv1D`` of GPT-2, ``y = x @ weight + bias`` with weight [in, out], on its child `linear`.

    The class it stands for is mixed in when a module of it is met: transformers is never imported for it.
    """

    kind = "transposed_linear"
    replaces = nn.Linear  # until a subclass for the real one is made, which nothing else is an instance of
    parameters_of = ("weight", "bias")

    @classmethod
    def body_for(cls, own: type[nn.Module]) -> dict[str, Any]:
        return {"forward": cls.forward}  # before that of the class it stands for, which it computes

    @classmethod
    def prepare(cls, module: Any) -> Self:
        new: Any = bare(cls, module)
        weight = parameter(module.weight.detach().T.contiguous(), like=module.weight)
        new.linear = linear(weight, module.bias)
        return new

    @property
    def weight(self) -> Tensor:
        return self.linear.weight.T  # type: ignore[union-attr, operator]

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias  # type: ignore[union-attr, return-value]

    __repr__ = nn.Module.__repr__  # transformers' own tells sizes only

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[operator]


class PreparedBilinear(PreparedModule, nn.Bilinear):
    """`nn.Bilinear`, ``y_o = x1 . W_o x2 + b_o``, on its child `linear`, which computes every ``W_o x2`` at once.

    Example:
        >>> import torch
        >>> PreparedBilinear.prepare(nn.Bilinear(3, 4, 5))(torch.randn(2, 3), torch.randn(2, 4)).shape
        torch.Size([2, 5])
    """

    kind = "bilinear"
    replaces = nn.Bilinear
    linear: nn.Linear

    @classmethod
    def prepare(cls, module: nn.Bilinear) -> Self:
        new: Any = bare(cls, module)
        new.linear = linear(parameter(module.weight.flatten(0, 1), like=module.weight), None)
        new.register_parameter("bias", module.bias)
        return new

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.linear.weight.unflatten(0, (self.out_features, self.in1_features))

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        if input1.shape[:-1] != input2.shape[:-1]:
            raise RuntimeError(
                f"bilinear(): input dimensions do not match: got {list(input1.shape)} and {list(input2.shape)}"
            )
        products = self.linear(input2).unflatten(-1, (self.out_features, self.in1_features))
        y = (products @ input1.unsqueeze(-1)).squeeze(-1)
        return y if self.bias is None else y + self.bias
