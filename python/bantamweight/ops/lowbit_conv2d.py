"""Packed low-bit 2-d convolution of int8 activations.

The input is rounded to int8 once, each image against its own absolute maximum over all channels, and
the linear kernel runs over rows of it given by pointers: there is no im2col buffer. A 1x1 convolution
without padding is a linear layer over pixels, each rounded against its own maximum. Depthwise
convolutions, which memory bounds, have a kernel of their own on float inputs. The output is channels
last, which the next convolution reads fastest.

`nn.PackedConv2d` calls `run_conv2d` in eager mode; under torch.compile and torch.export it calls
``torch.ops.bantamweight.lowbit_conv2d``, which this file defines with a fake implementation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .. import _C
from ..errors import BantamweightError, KernelError
from ..weights import QuantizedWeight
from .lowbit_linear import ALIGNMENT, LIBRARY, check_status


@dataclass(frozen=True, kw_only=True)
class Conv2dLayout:
    """What the header of a packed buffer says; pairs are (height, width)."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # zeros at the top, bottom, left, right
    dilation: tuple[int, int]
    groups: int
    bits: int
    group_size: int
    kernel: str

    @property
    def in_features(self) -> int:
        """Columns of the weight matrix."""
        return self.kernel_size[0] * self.kernel_size[1] * (self.in_channels // self.groups)


def pack_conv2d(
    weight: QuantizedWeight,
    *,
    in_channels: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] | str = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    kernel: str | None = None,
) -> Tensor:
    """The weight in the layout of the best kernel of this CPU, or of the one named.

    Args:
        weight: [out_channels, kh * kw * in_channels / groups] on the CPU, columns channels last
            (`weights.conv_matrix`).
        in_channels, kernel_size, stride, dilation, groups: as of `torch.nn.Conv2d`; pairs are (height, width).
        padding: zeros on both sides, "same" or "valid". Other padding modes: pad the input with
            `torch.nn.functional.pad` first and pass 0 here.
        kernel: "avx512_vnni", say; None for the best that BANTAMWEIGHT_FORCE_KERNEL allows.

    Returns:
        uint8 [bytes], for this machine's memory only; a file holds the canonical form.

    Raises:
        BantamweightError: the weight does not fit the convolution.
        KernelError: this CPU has no such kernel, or no kernel takes the convolution.

    Example:
        >>> import torch
        >>> from bantamweight import QuantizedWeight
        >>> codes = torch.randint(0, 16, (8, 3 * 3 * 4), dtype=torch.uint8)
        >>> w = QuantizedWeight.from_codes(codes, 0.1, 8.0, levels=16)
        >>> layout = pack_conv2d(w, in_channels=4, kernel_size=(3, 3), padding="same")
        >>> lowbit_conv2d(torch.randn(2, 4, 10, 12), layout).shape
        torch.Size([2, 8, 10, 12])
    """
    kh, kw = kernel_size
    if groups < 1 or in_channels % groups or weight.out_features % groups:
        raise BantamweightError(
            f"groups is {groups}, but must divide the {in_channels} input and {weight.out_features} output channels"
        )
    columns = kh * kw * (in_channels // groups)
    if weight.in_features != columns:
        raise BantamweightError(
            f"a weight of {weight.out_features}x{weight.in_features} came for a {kh}x{kw} convolution of {in_channels} "
            f"channels in {groups} groups, which has {columns} columns; flatten the weight with weights.conv_matrix"
        )
    shape = _C.ConvShape()
    shape.in_channels, shape.out_channels, shape.groups = in_channels, weight.out_features, groups
    shape.kernel_h, shape.kernel_w = kh, kw
    shape.stride_h, shape.stride_w = stride
    shape.dilation_h, shape.dilation_w = dilation
    top, bottom, left, right = padding_sides(padding, (kh, kw), dilation)
    shape.pad_top, shape.pad_bottom, shape.pad_left, shape.pad_right = top, bottom, left, right
    shape.bits = weight.bits
    # One group of a whole row may be written with any larger size; the kernels want the row's own.
    shape.group_size = min(weight.group_size, columns)
    isa = _select(shape, kernel)
    size = _C.conv_layout_bytes(shape, isa)
    if size < 0:
        raise KernelError(
            f"no kernel takes a {kh}x{kw} convolution of {in_channels} to {weight.out_features} channels with stride "
            f"{tuple(stride)}, padding {padding!r}, dilation {tuple(dilation)} and groups of {weight.group_size}; "
            "strides and dilations are 1 to 65536, paddings 0 to 65536, kernels 1 to 4096, and scale groups up to "
            "65536 columns or the whole row"
        )
    codes, scale, zero = (part.cpu().contiguous() for part in (weight.codes, weight.scale, weight.zero))
    layout = torch.empty(size, dtype=torch.uint8, device="cpu")
    status = _C.conv_pack(
        shape, isa, codes.data_ptr(), scale.data_ptr(), zero.data_ptr(), layout.data_ptr(), layout.numel()
    )
    check_status(status, f"packing a {weight.out_features}x{columns} convolution")
    return layout


def unpack_conv2d(layout: Tensor, levels: int) -> QuantizedWeight:
    """The exact inverse of `pack_conv2d`; `levels` as in the weight that was packed."""
    found = describe_conv2d(layout)
    n, k = found.out_channels, found.in_features
    groups = -(-k // found.group_size)
    codes = torch.empty((n, k), dtype=torch.uint8, device="cpu")
    scale = torch.empty((n, groups), dtype=torch.float32, device="cpu")
    zero = torch.empty((n, groups), dtype=torch.float32, device="cpu")
    status = _C.conv_unpack(layout.data_ptr(), layout.numel(), codes.data_ptr(), scale.data_ptr(), zero.data_ptr())
    check_status(status, "unpacking a convolution")
    return QuantizedWeight(codes=codes, scale=scale, zero=zero, levels=levels, group_size=found.group_size)


def describe_conv2d(layout: Tensor) -> Conv2dLayout:
    """Reads the shape and the kernel out of a packed buffer.

    Raises:
        KernelError: the bytes are not a packed convolution of this machine.
    """
    if layout.dtype != torch.uint8 or not layout.is_cpu or not layout.is_contiguous():
        raise KernelError(
            f"the packed weight is {layout.dtype} on {layout.device}, but must be contiguous uint8 on the CPU; "
            "make it with pack_conv2d"
        )
    status, shape, kernel = _C.conv_describe(layout.data_ptr(), layout.numel())
    check_status(status, "reading a packed convolution")
    return Conv2dLayout(
        in_channels=shape.in_channels,
        out_channels=shape.out_channels,
        kernel_size=(shape.kernel_h, shape.kernel_w),
        stride=(shape.stride_h, shape.stride_w),
        padding=(shape.pad_top, shape.pad_bottom, shape.pad_left, shape.pad_right),
        dilation=(shape.dilation_h, shape.dilation_w),
        groups=shape.groups,
        bits=shape.bits,
        group_size=shape.group_size,
        kernel=kernel,
    )


def lowbit_conv2d(x: Tensor, layout: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution that `pack_conv2d` packed, plus a bias.

    Args:
        x: float32, bfloat16 or float16 [n, in_channels, h, w] or [in_channels, h, w] on the CPU; any strides.
        layout: from `pack_conv2d`.
        bias: float32 [out_channels] or None.

    Returns:
        [n, out_channels, h', w'] in channels_last memory format, in the dtype of x.

    Raises:
        BantamweightError: x or bias is not such a tensor, x is smaller than the kernel, or holds NaN or infinity.
    """
    return run_conv2d(x, layout, bias, describe_conv2d(layout))


def run_conv2d(x: Tensor, layout: Tensor, bias: Tensor | None, found: Conv2dLayout) -> Tensor:
    """`lowbit_conv2d` for callers that have described the layout once and keep it 64-byte aligned."""
    # From here to the kernel every line is counted in tenths of a microsecond.
    if x.dtype is not torch.float32 or x.ndim != 4:
        return _run_general(x, layout, bias, found)
    n, channels, h, w = x.shape
    if channels != found.in_channels or not x.is_cpu:
        raise _refusal(x, found)
    oh, ow = _known_output_size(h, w, found.kernel_size, found.stride, found.padding, found.dilation)
    if oh < 1 or ow < 1 or h < 1 or w < 1:
        raise _refusal(x, found)
    x = x.resolve_neg()  # the imaginary part of a conjugate is negated where it is read
    bias_address = 0
    if bias is not None:
        if bias.dtype is not torch.float32 or bias.shape != (found.out_channels,) or not bias.is_cpu:
            raise BantamweightError(
                f"{_name(found)}: bias is {bias.dtype} {list(bias.shape)} on {bias.device}, but must be float32 "
                f"[{found.out_channels}] on the CPU"
            )
        bias = bias.contiguous().resolve_neg()
        bias_address = bias.data_ptr()
    y = torch.empty((n, found.out_channels, oh, ow), memory_format=torch.channels_last)
    if y.dtype is not torch.float32 or not y.is_cpu:  # torch.set_default_dtype, torch.set_default_device
        y = torch.empty_like(y, dtype=torch.float32, device="cpu")
    status = _C.conv_forward(
        layout.data_ptr(), layout.numel(), x.data_ptr(), n, h, w, *x.stride(), bias_address, y.data_ptr()
    )
    if status:
        check_status(status, _name(found))
    return y


def output_size(
    height: int,
    width: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Height and width of the output; padding is (top, bottom, left, right)."""
    top, bottom, left, right = padding
    return (
        (height + top + bottom - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1,
        (width + left + right - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1,
    )


_known_output_size = lru_cache(maxsize=4096)(output_size)


def padding_sides(
    padding: tuple[int, int] | str, kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Zeros at the top, bottom, left and right; "same" puts the odd one at the bottom and right, as torch does."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        height, width = (d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True))
        return (height // 2, height - height // 2, width // 2, width - width // 2)
    if isinstance(padding, str):
        raise BantamweightError(f"padding is {padding!r}, but must be 'same', 'valid' or two whole numbers")
    return (padding[0], padding[0], padding[1], padding[1])


def _select(shape: "_C.ConvShape", kernel: str | None) -> str:
    isa = _C.conv_select(shape, kernel or "")
    if kernel is not None and isa != kernel:
        variants = _C.depthwise_variants() if shape.depthwise else _C.linear_variants()
        names = ", ".join(name for name, missing in variants if not missing)
        raise KernelError(f"kernel is {kernel!r}, but the kernels of this machine for this convolution are {names}")
    return isa


def _name(found: Conv2dLayout) -> str:
    kh, kw = found.kernel_size
    return f"lowbit_conv2d {found.in_channels}->{found.out_channels} {kh}x{kw}"


def _refusal(x: Tensor, found: Conv2dLayout) -> BantamweightError:
    if not x.is_cpu:
        return BantamweightError(f"{_name(found)} runs on the CPU, but the input is on {x.device}; move it with .cpu()")
    if x.ndim not in (3, 4) or x.shape[-3] != found.in_channels:
        return BantamweightError(
            f"{_name(found)} takes inputs [n, {found.in_channels}, h, w], but {list(x.shape)} came; "
            "check the layer before it"
        )
    height, width = (d * (k - 1) + 1 for d, k in zip(found.dilation, found.kernel_size, strict=True))
    top, bottom, left, right = found.padding
    least_h, least_w = max(height - top - bottom, 1), max(width - left - right, 1)
    return BantamweightError(
        f"{_name(found)} takes images of at least {least_h}x{least_w}, but {list(x.shape)} came; "
        "pass larger images or a larger padding"
    )


def _run_general(x: Tensor, layout: Tensor, bias: Tensor | None, found: Conv2dLayout) -> Tensor:
    """Images without a batch dimension, and 16-bit floats."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise BantamweightError(
            f"{_name(found)} takes float32, bfloat16 or float16 inputs, but {x.dtype} came; convert with .float()"
        )
    if x.ndim not in (3, 4) or not x.is_cpu:
        raise _refusal(x, found)
    images = x.float() if x.ndim == 4 else x.float().unsqueeze(0)
    y = run_conv2d(images, layout, bias, found).to(x.dtype)
    return y if x.ndim == 4 else y.squeeze(0)


def _conv2d_cpu(
    x: Tensor,
    layout: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    if layout.data_ptr() % ALIGNMENT:  # a graph that was saved and loaded keeps its constants anywhere
        layout = layout.clone()
    found = describe_conv2d(layout)
    asked = (out_channels, tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation))
    if asked != (found.out_channels, found.kernel_size, found.stride, found.padding, found.dilation):
        raise BantamweightError(f"{_name(found)}: the geometry is {asked}, but must be that of the packed weight")
    return run_conv2d(x, layout, bias, found)


def _conv2d_fake(
    x: Tensor,
    layout: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    oh, ow = output_size(x.shape[-2], x.shape[-1], kernel_size, stride, padding, dilation)
    y = x.new_empty((*x.shape[:-3], oh, ow, out_channels))
    return y.movedim(-1, -3)


LIBRARY.define(
    "lowbit_conv2d(Tensor x, Tensor layout, Tensor? bias, int out_channels, int[2] kernel_size, int[2] stride, "
    "int[4] padding, int[2] dilation) -> Tensor"
)
LIBRARY.impl("lowbit_conv2d", _conv2d_cpu, "CPU")
torch.library.register_fake("bantamweight::lowbit_conv2d", _conv2d_fake, lib=LIBRARY)
