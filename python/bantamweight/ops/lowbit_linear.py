"""Packed low-bit weights times int8 activations: ``y = x W^T + bias``.

`nn.PackedLinear` calls the extension directly in eager mode, because a torch op costs more than a
small matvec. Under torch.compile and torch.export it calls ``torch.ops.bantamweight.lowbit_linear``,
which this file defines with a fake implementation, so that a graph holds an op and not a break.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from ..errors import BantamweightError, KernelError
from ..weights import QuantizedWeight

ALIGNMENT = 64  # bytes, of every packed buffer
BLOCK = 128  # columns that share an activation scale in mode int8-block

# How the kernels round a layer's inputs, in the order of the extension's enum.
ACTIVATIONS = ("int8", "int8-block", "int16")


@dataclass(frozen=True, kw_only=True)
class LinearLayout:
    """What the header of a packed buffer says."""

    out_features: int
    in_features: int
    bits: int
    group_size: int
    kernel: str
    activations: str
    stored_bits: float  # of a code as it lies in memory: 4 for 3 in a small layer, 5/3 for ternary in a large one


def check_activations(activations: str) -> None:
    if activations not in ACTIVATIONS:
        allowed = ", ".join(repr(mode) for mode in ACTIVATIONS)
        raise BantamweightError(f"activations is {activations!r}, but must be one of {allowed}")


def pack_linear(weight: QuantizedWeight, kernel: str | None = None, activations: str = "int8") -> Tensor:
    """The weight in the layout of the best kernel of this CPU, or of the one named.

    Args:
        weight: on the CPU.
        kernel: "avx512_vnni", say; None for the best that BANTAMWEIGHT_FORCE_KERNEL allows.
        activations: "int8" rounds inputs row by row; "int8-block" each block of 128 columns of a row (or group of
            fewer) around the middle of its range; "int16" row by row to 16 bits, at twice the arithmetic.

    Returns:
        uint8 [bytes], for this machine's memory only; a file holds the canonical form.

    Raises:
        KernelError: this CPU has no such kernel, or no kernel takes the weight.
        BantamweightError: no such activations.
    """
    check_activations(activations)
    mode = ACTIVATIONS.index(activations)
    isa = _C.linear_select(kernel or "")
    if kernel is not None and isa != kernel:
        names = [name for name, missing in _C.linear_variants() if not missing]
        raise KernelError(f"kernel is {kernel!r}, but the linear kernels of this machine are {', '.join(names)}")
    n, k = weight.out_features, weight.in_features
    # One group of a whole row may be written with any larger size; the kernels want the row's own.
    group_size = min(weight.group_size, max(k, 1))
    ternary = weight.levels == 3
    size = _C.linear_layout_bytes(n, k, weight.bits, group_size, isa, mode, ternary)
    if size < 0 and _C.linear_layout_bytes(n, k, weight.bits, group_size, isa) >= 0:
        raise KernelError(
            f"activations 'int8-block' are rounded {BLOCK} columns at a time, which groups of {group_size} neither "
            "divide nor are a multiple of; quantize in groups of 32, 64 or 128, or pass activations='int16'"
        )
    if size < 0:
        raise KernelError(
            f"no kernel takes a {n}x{k} weight in groups of {weight.group_size}; sizes go up to 2^31 - 1, and groups "
            "up to 65536 columns or the whole row"
        )
    codes, scale, zero = (part.cpu().contiguous() for part in (weight.codes, weight.scale, weight.zero))
    layout = torch.empty(size, dtype=torch.uint8, device="cpu")
    check_status(
        _C.linear_pack(
            n,
            k,
            weight.bits,
            group_size,
            isa,
            codes.data_ptr(),
            scale.data_ptr(),
            zero.data_ptr(),
            layout.data_ptr(),
            size,
            mode,
            ternary,
        ),
        f"packing a {n}x{k} weight",
    )
    return layout


def unpack_linear(layout: Tensor, levels: int) -> QuantizedWeight:
    """The exact inverse of `pack_linear`; `levels` as in the weight that was packed."""
    found = describe_linear(layout)
    n, k = found.out_features, found.in_features
    groups = -(-k // found.group_size)
    codes = torch.empty((n, k), dtype=torch.uint8, device="cpu")
    scale = torch.empty((n, groups), dtype=torch.float32, device="cpu")
    zero = torch.empty((n, groups), dtype=torch.float32, device="cpu")
    status = _C.linear_unpack(layout.data_ptr(), layout.numel(), codes.data_ptr(), scale.data_ptr(), zero.data_ptr())
    check_status(status, "unpacking")
    return QuantizedWeight(codes=codes, scale=scale, zero=zero, levels=levels, group_size=found.group_size)


def describe_linear(layout: Tensor) -> LinearLayout:
    """Reads the shape and the kernel out of a packed buffer.

    Raises:
        KernelError: the bytes are not a packed linear weight of this machine.
    """
    if layout.dtype != torch.uint8 or not layout.is_cpu or not layout.is_contiguous():
        raise KernelError(
            f"the packed weight is {layout.dtype} on {layout.device}, but must be contiguous uint8 on the CPU; "
            "make it with pack_linear"
        )
    status, n, k, bits, group_size, kernel, mode, stored = _C.linear_describe(layout.data_ptr(), layout.numel())
    check_status(status, "reading a packed weight")
    return LinearLayout(
        out_features=n,
        in_features=k,
        bits=bits,
        group_size=group_size,
        kernel=kernel,
        activations=ACTIVATIONS[mode],
        stored_bits=stored,
    )


def lowbit_linear(x: Tensor, layout: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """``x W^T + bias`` with a packed weight; x is rounded to int8 row by row inside.

    Args:
        x: float32, bfloat16 or float16 [..., in], on the CPU.
        layout: from `pack_linear`.
        bias: float32 [out] or None.
        out_features: of the weight in the layout.

    Returns:
        [..., out], in the dtype of x.

    Raises:
        BantamweightError: x is not such a tensor, or holds NaN or infinity.
    """
    return torch.ops.bantamweight.lowbit_linear(x, layout, bias, out_features)


def check_status(status: int, doing: str) -> None:
    """Turns a kernel's status code into a sentence."""
    if status:
        raise KernelError(f"{doing}: {_C.status_message(status)}")


def check_input(x: Tensor, in_features: int, name: str) -> Tensor:
    """x as a contiguous float32 tensor on the CPU, or a sentence that says what came and how to mend it."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise BantamweightError(
            f"{name} takes float32, bfloat16 or float16 inputs, but {x.dtype} came; convert with .float()"
        )
    if not x.is_cpu:
        raise BantamweightError(f"{name} runs on the CPU, but the input is on {x.device}; move it with .cpu()")
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise BantamweightError(
            f"{name} takes inputs [..., {in_features}], but {list(x.shape)} came; check the layer before it"
        )
    return x.to(torch.float32).contiguous().resolve_neg()


def _linear_cpu(x: Tensor, layout: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    if layout.data_ptr() % ALIGNMENT:  # a graph that was saved and loaded keeps its constants anywhere
        layout = layout.clone()
    found = describe_linear(layout)
    name = f"lowbit_linear {found.out_features}x{found.in_features}"
    if out_features != found.out_features:
        raise BantamweightError(f"{name}: out_features is {out_features}, but must be that of the packed weight")
    rows = check_input(x, found.in_features, name)
    if bias is not None and (bias.dtype != torch.float32 or tuple(bias.shape) != (out_features,) or not bias.is_cpu):
        raise BantamweightError(
            f"{name}: bias is {bias.dtype} {list(bias.shape)} on {bias.device}, but must be float32 [{out_features}] "
            "on the CPU"
        )
    bias = None if bias is None else bias.contiguous().resolve_neg()
    y = torch.empty((*x.shape[:-1], out_features), dtype=torch.float32, device="cpu")
    m = y.numel() // max(out_features, 1)
    status = _C.linear_forward(
        layout.data_ptr(),
        layout.numel(),
        rows.data_ptr(),
        found.in_features,
        m,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        out_features,
    )
    check_status(status, name)
    return y.to(x.dtype)


def _linear_fake(x: Tensor, layout: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


LIBRARY = torch.library.Library("bantamweight", "FRAGMENT")
LIBRARY.define("lowbit_linear(Tensor x, Tensor layout, Tensor? bias, int out_features) -> Tensor")
LIBRARY.impl("lowbit_linear", _linear_cpu, "CPU")
torch.library.register_fake("bantamweight::lowbit_linear", _linear_fake, lib=LIBRARY)
