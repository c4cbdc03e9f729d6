"""Chains of packed convolutions, with what lies between them, as one call."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional as F  # noqa: N812

from .. import _C
from ..errors import BantamweightError, CalibrationError
from ..ops.lowbit_linear import check_status
from .packed import PackedConv2d, in_format_of


@dataclass(eq=False, kw_only=True)
class Step:
    """A step of `csrc/conv_network`; `input` and `residual` are steps, None for the chain's input."""

    kind: Literal["conv", "max_pool", "average", "subsample", "add"]
    input: "Step | None"
    residual: "Step | None" = None
    relu: bool = False
    conv: PackedConv2d | None = None
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    channels: tuple[int, int] = (0, 0)  # zeros before and after

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The same by torch and the single layers."""
        match self.kind:
            case "conv":
                assert self.conv is not None
                x = self.conv(x)
            case "max_pool":
                x = F.max_pool2d(x, self.kernel_size, self.stride, self.padding)
            case "average":
                x = x.mean((-2, -1), keepdim=True)
            case "subsample":
                x = F.pad(x[:, :, :: self.stride[0], :: self.stride[1]], (0, 0, 0, 0, *self.channels))
        if residual is not None:
            x = x + residual
        return x.relu() if self.relu else x


@dataclass(frozen=True, kw_only=True)
class CodeRange:
    """A feature map as int8 codes: value = scale * (code - zero), codes -127 .. 127."""

    scale: float
    zero: int

    @classmethod
    def covering(cls, low: float, high: float) -> "CodeRange":
        """Of the values from low to high and zero, which has a code: -127 where no value is below it."""
        low, high = min(low, 0.0), max(high, 0.0)
        # Rounded to the float32 that the kernels compute with.
        scale = float(torch.tensor((high - low) / 254, dtype=torch.float32))
        if scale < torch.finfo(torch.float32).tiny:  # a map of zeros
            return cls(scale=1.0, zero=-127)
        return cls(scale=scale, zero=max(-127, min(127, round(-127 - low / scale))))


class PackedConvChain(nn.Module):
    """Packed convolutions and the ReLUs, residual sums and poolings between them; `nn.fuse` makes it.

    A few images at a time run through the whole chain in memory that is kept between calls, so feature maps stay in
    the caches. Outputs equal those of the single layers (an average over pixels up to float rounding), and are
    channels last where the input is.

    After `use_int8_maps` the maps inside the chain are int8 with one scale a map, known from calibration data (Jacob
    et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018, arXiv
    1712.05877), as static quantization elsewhere has them: a convolution writes them and the next reads them as they
    lie. Only the chain's input is still rounded image by image. Graphs of torch.compile and traces keep the single
    layers, whose scales are dynamic.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        flat: bool,
        places: Sequence[tuple[dict[str, Any], str]],
        dropouts: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self._places = tuple(places)  # of each step's convolution: its parent's submodules, and its name there
        self._steps, self._flat = tuple(steps), flat
        self._dropouts = tuple(dropouts)  # between the steps; they do nothing in eval mode
        self.convolutions = nn.ModuleList(step.conv for step in steps if step.conv is not None)
        self._key: Any = None  # the addresses that _network was built on
        self._network: Any = None
        self._ranges: dict[Step, CodeRange] = {}  # of every step but the last; empty: float maps
        self._seen: dict[Step, tuple[float, float]] | None = None  # what `observe` has met

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_key": None, "_network": None}

    def forward(self, x: Tensor) -> Tensor:
        """y [n, channels, h', w'] (or [n, channels] after an average that was flattened) in the dtype of x.

        Raises:
            BantamweightError: x is not a float32, bfloat16 or float16 tensor on the CPU with the channels of the first
                layer, is too small for a layer, requires a gradient, or holds NaN or infinity; or a dropout between
                the layers is in training mode.
        """
        if any(dropout.training for dropout in self._dropouts):
            raise BantamweightError(
                "a dropout inside a fused chain of convolutions is in training mode, but chains are for inference; "
                "call eval() on it, or run the packed model"
            )
        if self._ranges and x.dtype in (torch.bfloat16, torch.float16) and not (is_compiling() or is_tracing()):
            return self.forward(x.float()).to(x.dtype)
        plain = type(x) is Tensor and x.dtype is torch.float32 and x.is_cpu and x.ndim == 4 and len(x)
        if not plain or is_compiling() or is_tracing() or (x.requires_grad and torch.is_grad_enabled()):
            return self._run_layers(x)
        if self._seen is not None:
            return self._run_layers(x)
        try:
            key = [modules[name]._addresses for modules, name in self._places]
        except (AttributeError, KeyError):  # another kind of layer, or none
            key = None
        if key is None or key != self._key:
            self._check_layers()
            self._network, self._key = _C.ConvNetwork(self._describe()), key
        images, channels, h, w = x.shape
        status, *size = self._network.output_size(channels, h, w)
        if status:
            return self._run_layers(x)  # the layer that does not take its input says so
        y = torch.empty((images, *size), memory_format=torch.channels_last, dtype=torch.float32, device="cpu")
        status = self._network.forward(x.data_ptr(), images, channels, h, w, *x.stride(), y.data_ptr())
        if status:
            check_status(status, "a chain of packed convolutions")
        return y.flatten(1) if self._flat else in_format_of(x, y)

    def _check_layers(self) -> None:
        """Whoever puts another layer into the model must not be answered by the one that was there."""
        convolutions = (step.conv for step in self._steps if step.conv is not None)
        for (modules, name), conv in zip(self._places, convolutions, strict=True):
            if modules.get(name) is not conv or type(conv) is not PackedConv2d:
                raise BantamweightError(
                    f"layer {name!r} of a fused model is another one than when it was fused; change the packed model, "
                    "and fuse that again"
                )

    @property
    def has_int8_maps(self) -> bool:
        return bool(self._ranges)

    def observe(self, on: bool) -> None:
        """Starts or stops recording the range of every map, on the float maps of the single layers."""
        self._seen = {} if on else None

    def use_int8_maps(self) -> None:
        """Makes the maps between the steps int8, in the ranges that were recorded since `observe`, and stops that.

        Raises:
            CalibrationError: nothing was recorded, or no finite range.
        """
        seen, self._seen = self._seen, None
        if not seen:
            raise CalibrationError(
                f"the calibration data never reaches the chain of convolutions that begins with "
                f"{self._steps[0].conv}; pass calibration data that the whole model runs on"
            )
        ranges: dict[Step, CodeRange] = {}
        for step in self._steps[:-1]:
            if step.kind in ("max_pool", "subsample"):  # keep the codes they are given
                assert step.input is not None
                ranges[step] = ranges[step.input]
                continue
            low, high = seen[step]
            if not math.isfinite(high - low):
                raise CalibrationError(
                    f"the feature maps behind {step.conv or step.kind} reach from {low:g} to {high:g} on the "
                    "calibration data, which no int8 scale covers; scale the calibration data, or check the weights"
                )
            ranges[step] = CodeRange.covering(0.0 if step.relu else low, high)
        self._ranges, self._key = ranges, None

    def _run_layers(self, x: Tensor) -> Tensor:
        """The way of graphs, of tensors that are more than a plain one, and of refusals."""
        if not is_compiling():
            self._check_layers()
        values: dict[Step | None, Tensor] = {None: x}
        y = x
        for step in self._steps:
            y = step.run(values[step.input], None if step.residual is None else values[step.residual])
            values[step] = y
            if self._seen is not None and y.numel():
                low, high = self._seen.get(step, (0.0, 0.0))
                self._seen[step] = (min(low, float(y.amin())), max(high, float(y.amax())))
        return y.flatten(1) if self._flat else y

    def _describe(self) -> list["_C.NetworkStep"]:
        index: dict[Step | None, int] = {None: 0}
        described = []
        for step in self._steps:
            made = _C.NetworkStep()
            made.kind, made.input, made.relu = step.kind, index[step.input], step.relu
            made.residual = -1 if step.residual is None else index[step.residual]
            if step.conv is not None:
                made.set_conv(*step.conv._addresses)
            made.kernel_h, made.kernel_w = step.kernel_size
            made.stride_h, made.stride_w = step.stride
            made.pad_h, made.pad_w = step.padding
            made.channels_before, made.channels_after = step.channels
            if (maps := self._ranges.get(step)) is not None:
                made.scale, made.zero = maps.scale, maps.zero
            described.append(made)
            index[step] = len(described)
        return described

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._key = None
        return self

    def extra_repr(self) -> str:
        return f"{len(self._steps)} steps" + (", int8 maps" if self._ranges else "")
