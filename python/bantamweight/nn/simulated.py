"""The simulated form: float arithmetic on dequantized weights, on any device, with gradients.

For training, for oracles, and for machines without a kernel. With ``activation_bits=8`` the input is
rounded to int8 by the kernels' own rule, and a packed layer equals it up to float rounding.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)

from ..errors import BantamweightError
from ..io.bitpack import pack_codes, unpack_codes
from ..ops.lowbit_linear import BLOCK, check_activations
from ..weights import ConvGeometry, QuantizedWeight, conv_weight
from .layer import Conv2dAttributes, QuantizedLayer, check_bias


class _RoundToInt8(torch.autograd.Function):
    """Rounds each slice to int8 against its own absolute maximum; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        maximum = x.abs().amax(dims, keepdim=True)
        # Tensor by tensor: torch turns a division of or by a number into a rounded reciprocal and a product.
        most = torch.full_like(maximum, 127.0)
        to_code = most / maximum
        # A maximum so small that 127 / maximum overflows counts as zero, as in the kernels.
        usable = torch.isfinite(to_code)
        codes = torch.round(x * torch.where(usable, to_code, 0.0))
        return codes * torch.where(usable, maximum / most, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad_output, None


class _RoundToInt16(torch.autograd.Function):
    """Rounds each row to 127 * 254 steps on either side of zero; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        maximum = x.abs().amax(-1, keepdim=True)
        most = torch.full_like(maximum, 127.0 * 254.0)
        to_code = most / maximum
        usable = torch.isfinite(to_code)
        codes = torch.round(x * torch.where(usable, to_code, 0.0))
        return codes * torch.where(usable, maximum / most, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        return grad_output


class _RoundAroundMiddle(torch.autograd.Function):
    """Rounds each block [..., block] to 127 steps on either side of the middle of its range; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        least, largest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        middle = 0.5 * largest + 0.5 * least
        # The middle is rounded, so that either end may be farther from it.
        maximum = torch.maximum(largest - middle, middle - least)
        most = torch.full_like(maximum, 127.0)
        to_code = most / maximum
        usable = torch.isfinite(to_code)
        codes = torch.round((x - middle) * torch.where(usable, to_code, 0.0))
        return codes * torch.where(usable, maximum / most, 0.0) + middle

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # type: ignore[override]
        return grad_output


def simulate_int8(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x as the kernels see it: ``round(x * 127 / max|x|) * max|x| / 127`` over `dims`; x for no `dims`."""
    if x.numel() == 0 or not dims:
        return x
    return _RoundToInt8.apply(x, dims)  # type: ignore[return-value]


def simulate_activations(x: Tensor, activations: str, group_size: int) -> Tensor:
    """The rows of x [..., in] as a linear kernel sees them, in one of the modes of `ops.lowbit_linear.ACTIVATIONS`.

    Args:
        group_size: columns that share a scale of the weight; blocks are of that size where it is below 128.
            A block is rounded around the middle of its range, a row around zero.
    """
    if activations == "int8" or x.numel() == 0:
        return simulate_int8(x, (-1,))
    if activations == "int16":
        return _RoundToInt16.apply(x)  # type: ignore[return-value]
    size = min(group_size, BLOCK, x.shape[-1])
    filler = x[..., -1:].expand(*x.shape[:-1], -x.shape[-1] % size)  # which changes no range
    blocks = torch.cat((x, filler), dim=-1).unflatten(-1, (-1, size))
    rounded: Tensor = _RoundAroundMiddle.apply(blocks)  # type: ignore[assignment]
    return rounded.flatten(-2)[..., : x.shape[-1]]


class SimulatedLayer(QuantizedLayer):
    """Codes, scales and zeros as buffers, and the float weight they stand for as a cache."""

    form = "simulated"
    codes: Tensor  # bit-packed, uint8
    scale: Tensor
    zero: Tensor
    weight: Tensor
    levels: int
    group_size: int

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None, activation_bits: int | None) -> None:
        super().__init__()
        if activation_bits not in (None, 8):
            raise BantamweightError(f"activation_bits is {activation_bits!r}, but must be 8, or None for float inputs")
        check_bias(bias, quantized.out_features)
        self.activation_bits = activation_bits
        self.rows, self.columns = quantized.out_features, quantized.in_features
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        for name in ("codes", "scale", "zero", "weight"):
            self.register_buffer(name, None, persistent=False)  # the state dict is QuantizedLayer's work
        dtype = torch.float32 if bias is None else bias.dtype
        self._hold(quantized, dtype)

    def _hold(self, quantized: QuantizedWeight, dtype: torch.dtype) -> None:
        self.levels, self.group_size = quantized.levels, quantized.group_size
        self.codes = pack_codes(quantized.codes, quantized.levels)
        self.scale = quantized.scale.clone()
        self.zero = quantized.zero.clone()
        self.scheme = quantized.scheme
        self.weight = self.shape_weight(quantized.dequantize()).to(dtype)

    def shape_weight(self, matrix: Tensor) -> Tensor:
        """The matrix [out, in] as the layer's float operation wants it."""
        return matrix

    @property
    def quantized(self) -> QuantizedWeight:
        return QuantizedWeight(
            codes=unpack_codes(self.codes, self.levels, self.columns),
            scale=self.scale,
            zero=self.zero,
            levels=self.levels,
            group_size=self.group_size,
        )

    def set_quantized(self, weight: QuantizedWeight) -> None:
        self.check_same_shape(weight)
        self._hold(weight.to(self.codes.device), self.weight.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # .half() or .double() convert the cached weight and the bias; the codes and the scales stay as they are, exact.
        codes, scale, zero, dtype = self.codes, self.scale, self.zero, self.weight.dtype
        super()._apply(fn, recurse)
        device = self.codes.device
        if self.codes.dtype != torch.uint8:
            self.codes = codes.to(device)
        self.scale, self.zero = scale.to(device), zero.to(device)
        if self.weight.dtype.itemsize > dtype.itemsize and not self.codes.is_meta:  # what was rounded comes back
            self.weight = self.shape_weight(self.quantized.dequantize()).to(self.weight.dtype)
        return self

    def describe(self) -> str:
        rounded = {"int8": "A8", "int8-block": "A8-b128", "int16": "A16"}[self.activations]
        suffix = "" if self.activation_bits is None else rounded
        return f"bias={self.bias is not None}, simulated {self.scheme}{suffix}"


class SimulatedLinear(SimulatedLayer):
    """`nn.Linear` with the weight a QuantizedWeight stands for.

    With ``activation_bits=8`` inputs are rounded as the packed layer's kernel rounds them: `activations` is "int8",
    "int8-block" or "int16", as of PackedLinear, and what `pack` makes of the layer.

    Example:
        >>> import torch
        >>> from bantamweight import QuantizedWeight
        >>> w = QuantizedWeight.from_codes(torch.randint(0, 16, (8, 32), dtype=torch.uint8), 0.1, 8.0, levels=16)
        >>> SimulatedLinear(w)(torch.randn(4, 32)).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        quantized: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        activation_bits: int | None = None,
        activations: str = "int8",
    ) -> None:
        check_activations(activations)
        super().__init__(quantized, bias, activation_bits)
        self.activations = activations
        self.out_features, self.in_features = quantized.out_features, quantized.in_features

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        quantized: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        activation_bits: int | None = None,
    ) -> Self:
        """Takes the place of `linear`; `bias` replaces its bias (a corrected one, say), None keeps it.

        Raises:
            BantamweightError: the weight or the bias has another shape than the layer.
        """
        if (quantized.out_features, quantized.in_features) != (linear.out_features, linear.in_features):
            raise BantamweightError(
                f"a weight of {quantized.out_features}x{quantized.in_features} came for a linear layer of "
                f"{linear.out_features}x{linear.in_features}; pass the weight of this layer"
            )
        return cls(quantized, linear.bias if bias is None else bias, activation_bits=activation_bits)

    def forward(self, input: Tensor) -> Tensor:
        if self.activation_bits is not None:
            input = simulate_activations(input, self.activations, self.group_size)
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.describe()}"


class SimulatedConv2d(Conv2dAttributes, SimulatedLayer):
    """`nn.Conv2d` with the weight a QuantizedWeight stands for; its codes are channels last (`weights.conv_matrix`)."""

    def __init__(
        self,
        quantized: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        in_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        padding_mode: str = "zeros",
        activation_bits: int | None = None,
    ) -> None:
        self.in_channels, self.out_channels, self.groups = in_channels, quantized.out_features, groups
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.dilation, self.padding_mode = dilation, padding_mode
        self.geometry.check(quantized)
        super().__init__(quantized, bias, activation_bits)

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        quantized: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        activation_bits: int | None = None,
    ) -> Self:
        """Takes the place of `conv`; `bias` replaces its bias (a corrected one, say), None keeps it.

        Raises:
            BantamweightError: the weight or the bias has another shape than the layer.
        """
        if quantized.out_features != conv.out_channels:
            raise BantamweightError(
                f"a weight of {quantized.out_features} rows came for a convolution of {conv.out_channels} output "
                "channels; pass the weight of this layer"
            )
        return cls(
            quantized,
            conv.bias if bias is None else bias,
            activation_bits=activation_bits,
            **vars(ConvGeometry.of(conv)),
        )

    def shape_weight(self, matrix: Tensor) -> Tensor:
        return conv_weight(matrix, *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        if self.activation_bits is not None:
            input = simulate_int8(input, self.geometry.rounded_together(self.out_channels))
        return self._conv_forward(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self._words()}, {self.describe()}"
