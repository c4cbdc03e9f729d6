"""The packed form: codes in the layout of one kernel of this machine, run by integer arithmetic."""

from dataclasses import fields
from typing import Any, Self

import torch
from torch import Tensor, empty, empty_strided, float32, fx, nn
from torch._C import _get_tracing_state  # pyright: ignore[reportPrivateImportUsage]
from torch.compiler import is_compiling
from torch.nn.functional import pad
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks  # as Module.__call__ reads them

from .._C import LinearGroup, conv_forward, linear_forward
from ..errors import BantamweightError
from ..io.bitpack import bits_for
from ..ops.lowbit_conv2d import Conv2dLayout, describe_conv2d, pack_conv2d, padding_sides, run_conv2d, unpack_conv2d
from ..ops.lowbit_linear import check_input, check_status, describe_linear, pack_linear, unpack_linear
from ..ops.quantized_rows import QuantizedRows
from ..weights import ConvGeometry, QuantizedWeight, pair
from .layer import Conv2dAttributes
from .packed_layer import PackedLayer


class PackedLinear(PackedLayer):
    """`nn.Linear` on a low-bit kernel; inputs are rounded to int8 row by row, or more finely.

    `activations` is "int8", "int8-block" (a range for every 128 columns of a row, for inputs with outliers) or "int16"
    (weights are then the only thing that rounding changes; twice the arithmetic, the same reading of weights).

    Example:
        >>> import torch
        >>> from bantamweight import QuantizedWeight
        >>> w = QuantizedWeight.from_codes(torch.randint(0, 16, (8, 32), dtype=torch.uint8), 0.1, 8.0, levels=16)
        >>> PackedLinear.from_quantized(w)(torch.randn(4, 32)).shape
        torch.Size([4, 8])
    """

    kind = "linear"
    out_features: int
    in_features: int
    stored_bits: float  # of a code in `layout`, which the kernel chooses by size: 4 for 3, 5/3 for ternary
    _fixed = PackedLayer._fixed | {"out_features", "in_features", "activations"}

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "forward" in vars(cls):  # which the way past nn.Module below would not see
            cls.__call__ = nn.Module.__call__  # type: ignore[method-assign]

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None = None, *, activations: str = "int8") -> None:
        self.__dict__["activations"] = activations
        self.__dict__["out_features"], self.__dict__["in_features"] = quantized.out_features, quantized.in_features
        super().__init__(quantized, bias)

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None = None, *, activations: str = "int8") -> Self:
        """Packs the weight for the best kernel of this machine (or the one BANTAMWEIGHT_FORCE_KERNEL allows).

        Raises:
            KernelError: no kernel takes the weight.
            BantamweightError: the bias is not one finite float a channel, or there are no such activations.
        """
        return cls(weight, bias, activations=activations)

    def pack(self, quantized: QuantizedWeight) -> Tensor:
        return pack_linear(quantized, activations=self.activations)

    def adopt(self, layout: Tensor) -> None:
        found = describe_linear(layout)
        came = (found.out_features, found.in_features, found.bits, found.activations)
        if came != (self.rows, self.columns, bits_for(self.levels), self.activations):
            self.refuse_layout("{}x{} codes of {} bits for {} inputs".format(*came))
        self.kernel, self.stored_bits = found.kernel, found.stored_bits

    @property
    def quantized(self) -> QuantizedWeight:
        return unpack_linear(self.layout, self.levels)

    def __call__(self, input: Tensor | QuantizedRows) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As nn.Module's, which takes 0.5 us to find that there is nothing but `forward` to call: a tenth of a layer.

        Whatever else there is (hooks, a tracer, torch.compile, whose ways go through nn.Module's) is left to it; no
        backward hook is due, because no gradient passes a packed layer.
        """
        if (
            type(input) is not Tensor
            or self._forward_hooks
            or self._forward_pre_hooks
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or self._compiled_call_impl is not None
            or "forward" in self.__dict__
            or is_compiling()
            or _get_tracing_state()
        ):
            return super().__call__(input)
        return self._run(input)

    def forward(self, input: Tensor | QuantizedRows) -> Tensor:
        """y [..., out] in the dtype of the input [..., in], on the CPU; float32 for rounded rows.

        Raises:
            BantamweightError: the input is not a float32, bfloat16 or float16 tensor on the CPU, requires a gradient,
                or holds NaN or infinity.
        """
        if type(input) is not Tensor or is_compiling() or _get_tracing_state():
            return self._forward_rows(input) if isinstance(input, QuantizedRows) else self._forward_op(input)
        return self._run(input)

    def _run(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            self.refuse_gradient()
        # From here to the kernel every line is counted in tens of nanoseconds.
        n, k, shape = self.out_features, self.in_features, x.shape
        if x.dtype is not float32 or not x.is_contiguous() or not x.is_cpu or not shape or shape[-1] != k:
            return self._run(check_input(x.detach(), k, self.name_of_layer)).to(x.dtype)
        if len(shape) == 2:
            m = shape[0]
            y = empty(m, n)
        else:
            m = shape[:-1].numel()
            y = empty((*shape[:-1], n))
        if y.dtype is not float32 or not y.is_cpu:  # torch.set_default_dtype, torch.set_default_device
            y = torch.empty((*shape[:-1], n), dtype=float32, device="cpu")
        layout, layout_bytes, bias = self._at
        held = self._buffers
        # `_addresses`, without the call.
        if held["layout"].data_ptr() != layout or (0 if (b := held["bias"]) is None else b.data_ptr()) != bias:  # type: ignore
            layout, layout_bytes, bias = self._addresses
        status = linear_forward(layout, layout_bytes, x.data_ptr(), k, m, bias, y.data_ptr(), n)
        if status:
            check_status(status, self.name_of_layer)
        return y

    def _forward_rows(self, x: QuantizedRows) -> Tensor:
        """The way of activations that were rounded before."""
        n, k = self.out_features, self.in_features
        if not x.shape or x.shape[-1] != k:
            raise BantamweightError(f"{self.name_of_layer} takes rows of {k}, but rows of {list(x.shape)} came")
        y = torch.empty((*x.shape[:-1], n), dtype=float32, device="cpu")
        m = len(x.scale)
        status = LinearGroup([self._addresses]).forward(0, k, x.addresses, m, 0, 0, 0, y.data_ptr(), n)
        check_status(status, self.name_of_layer)
        return y

    def _forward_op(self, x: Tensor) -> Tensor:
        """The way of graphs, and of tensors that are more than a plain one."""
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            self.refuse_gradient()
        return torch.ops.bantamweight.lowbit_linear(x, self.layout, self.bias, self.out_features)

    def extra_repr(self) -> str:
        stored = "" if self.stored_bits == bits_for(self.levels) else f", {self.stored_bits:.3g} bits in memory"
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.describe()}{stored}"


class PackedConv2d(Conv2dAttributes, PackedLayer):
    """`nn.Conv2d` on a low-bit kernel.

    The kernel writes channels last, and a channels-last input keeps that, as in torch; for any other input the output
    is copied to be contiguous, so that ``.view(n, -1)`` works behind it (16 maps of 64x56x56: some 4 ms; free where the
    map is one pixel or one channel). Run networks of convolutions in ``torch.channels_last``, or fused (`nn.fuse`).

    Inputs are rounded to int8 image by image, those of a 1x1 convolution without padding pixel by pixel; those of a
    depthwise convolution stay float.

    Example:
        >>> import torch
        >>> from bantamweight import QuantizedWeight
        >>> w = QuantizedWeight.from_codes(torch.randint(0, 3, (8, 36), dtype=torch.uint8), 0.1, 1.0, levels=3)
        >>> conv = PackedConv2d.from_quantized(w, in_channels=4, kernel_size=(3, 3), padding=(1, 1))
        >>> conv(torch.randn(2, 4, 10, 10)).shape
        torch.Size([2, 8, 10, 10])
    """

    kind = "conv2d"
    _fixed = PackedLayer._fixed | {"out_channels", *(argument.name for argument in fields(ConvGeometry))}
    _described: Conv2dLayout
    _sizes: tuple[int, int, int, int, int]

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
    ) -> None:
        self.in_channels, self.out_channels, self.groups = in_channels, quantized.out_features, groups
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.dilation, self.padding_mode = dilation, padding_mode
        self.geometry.check(quantized)
        super().__init__(quantized, bias)

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        in_channels: int,
        kernel_size: tuple[int, int] | int,
        stride: tuple[int, int] | int = 1,
        padding: tuple[int, int] | int | str = 0,
        dilation: tuple[int, int] | int = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
    ) -> Self:
        """Packs the weight for the best kernel of this machine (or the one BANTAMWEIGHT_FORCE_KERNEL allows).

        Args:
            weight: codes [out_channels, kh * kw * in_channels / groups], channels last (`weights.conv_matrix`).
            in_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as of nn.Conv2d.

        Raises:
            KernelError: no kernel takes the convolution.
            BantamweightError: the weight does not fit it, or the bias is not one finite float a channel.
        """
        return cls(
            weight,
            bias,
            in_channels=in_channels,
            kernel_size=pair(kernel_size),
            stride=pair(stride),
            padding=padding if isinstance(padding, str) else pair(padding),
            dilation=pair(dilation),
            groups=groups,
            padding_mode=padding_mode,
        )

    def pack(self, quantized: QuantizedWeight) -> Tensor:
        geometry = self.geometry
        return pack_conv2d(
            quantized,
            in_channels=geometry.in_channels,
            kernel_size=geometry.kernel_size,
            stride=geometry.stride,
            padding=geometry.padding if geometry.padding_mode == "zeros" else (0, 0),
            dilation=geometry.dilation,
            groups=geometry.groups,
        )

    def adopt(self, layout: Tensor) -> None:
        found, asked = describe_conv2d(layout), self.geometry
        padding = asked.padding if asked.padding_mode == "zeros" else (0, 0)
        expected = Conv2dLayout(
            in_channels=asked.in_channels,
            out_channels=self.rows,
            kernel_size=asked.kernel_size,
            stride=asked.stride,
            padding=padding_sides(padding, asked.kernel_size, asked.dilation),
            dilation=asked.dilation,
            groups=asked.groups,
            bits=bits_for(self.levels),
            group_size=found.group_size,
            kernel=found.kernel,
        )
        if found != expected:
            self.refuse_layout(str(found))
        self._described, self.kernel = found, found.kernel
        # The output's height is (height + extra) // stride, and so is its width.
        extra_h, extra_w = (
            sum(found.padding[2 * i : 2 * i + 2]) - found.dilation[i] * (found.kernel_size[i] - 1) - 1 + found.stride[i]
            for i in (0, 1)
        )
        self._sizes = (found.in_channels, extra_h, found.stride[0], extra_w, found.stride[1])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.rows, self.in_channels // self.groups, *self.kernel_size)

    @property
    def quantized(self) -> QuantizedWeight:
        return unpack_conv2d(self.layout, self.levels)

    def forward(self, input: Tensor) -> Tensor:
        """y [n, out_channels, h', w'] in the dtype of the input [n, in_channels, h, w] (or both without n).

        Raises:
            BantamweightError: the input is not a float32, bfloat16 or float16 tensor on the CPU, is smaller than the
                kernel, requires a gradient, or holds NaN or infinity.
        """
        if type(input) is not Tensor or self.padding_mode != "zeros" or is_compiling() or _get_tracing_state():
            return in_format_of(input, self._forward_general(input))
        if input.requires_grad and torch.is_grad_enabled():
            self.refuse_gradient()
        # As in PackedLinear: a small image takes the kernel a few microseconds.
        layout, layout_bytes, bias = self._at
        held = self._buffers
        if held["layout"].data_ptr() != layout or (0 if (b := held["bias"]) is None else b.data_ptr()) != bias:  # type: ignore
            layout, layout_bytes, bias = self._addresses
        shape, (channels, extra_h, stride_h, extra_w, stride_w) = input.shape, self._sizes
        if len(shape) != 4 or shape[1] != channels or input.dtype is not float32 or not input.is_cpu or input.is_neg():
            return in_format_of(input, run_conv2d(input, self.layout, self.bias, self._described))
        images, _, h, w = shape
        n, oh, ow = self.out_channels, (h + extra_h) // stride_h, (w + extra_w) // stride_w
        if oh < 1 or ow < 1 or h < 1 or w < 1:
            return run_conv2d(input, self.layout, self.bias, self._described)  # which says what is wrong
        size, strides = (images, n, oh, ow), (oh * ow * n, 1, ow * n, n)
        y = empty_strided(size, strides)
        if y.dtype is not float32 or not y.is_cpu:  # torch.set_default_dtype, torch.set_default_device
            y = empty_strided(size, strides, dtype=float32, device="cpu")
        of_image, of_channel, of_row, of_column = input.stride()
        status = conv_forward(
            layout,
            layout_bytes,
            input.data_ptr(),
            images,
            h,
            w,
            of_image,
            of_channel,
            of_row,
            of_column,
            bias,
            y.data_ptr(),
        )
        if status:
            check_status(status, self.name_of_layer)
        return y if of_channel < of_column and not input.is_contiguous() else y.contiguous()

    def _forward_general(self, x: Tensor) -> Tensor:
        """The way of padding that is not of zeros, of graphs, and of tensors that are more than a plain one."""
        if self.padding_mode != "zeros":
            x = pad(x, self.geometry.sides, mode=self.padding_mode)
        if type(x) is not Tensor or is_compiling() or _get_tracing_state():
            return self._forward_op(x)
        if x.requires_grad and torch.is_grad_enabled():
            self.refuse_gradient()
        self._addresses  # noqa: B018  (which checks what lies there)
        return run_conv2d(x, self.layout, self.bias, self._described)

    def _forward_op(self, x: Tensor) -> Tensor:
        """The way of graphs, and of tensors that are more than a plain one."""
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            self.refuse_gradient()
        found = self._described
        return torch.ops.bantamweight.lowbit_conv2d(
            x,
            self.layout,
            self.bias,
            found.out_channels,
            found.kernel_size,
            found.stride,
            found.padding,
            found.dilation,
        )

    def extra_repr(self) -> str:
        return f"{self._words()}, {self.describe()}"


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """y channels last, as the kernel wrote it, if x is, and contiguous if not, as torch's convolution answers."""
    strides = x.stride()
    return y if strides[-3] < strides[-1] and not x.is_contiguous() else y.contiguous()


fx.wrap("in_format_of")  # a proxy has no strides: a traced graph asks for them when it runs
