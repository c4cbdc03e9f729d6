"""Layers that are nn.Linear in another dress: transformers' Conv1D."""

from typing import Any, Self

from torch import Tensor, nn

from .base import PreparedModule, bare, class_for, linear, parameter


class PreparedTransposedLinear(PreparedModule):
    """transformers' ``Conv1D`` of GPT-2, ``y = x @ weight + bias`` with weight [in, out], on its child `linear`.

    The class it stands for is mixed in when a module of it is met: transformers is never imported for it.
    """

    kind = "transposed_linear"
    replaces = nn.Linear  # until a subclass for the real one is made, which nothing else is an instance of
    parameters_of = ("weight", "bias")

    @classmethod
    def prepare(cls, module: Any) -> Self:
        new: Any = bare(class_for(cls, type(module)))
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
