"""nn.ConvTranspose1d and nn.ConvTranspose2d as plain convolutions whose channels are the phases of the output.

Along an axis of stride s, output o takes the taps k with (o + padding) mod s = k mod s: each of the s phases is a
plain convolution with every s-th tap, flipped, and the phases are interleaved afterwards (the sub-pixel convolution of
Shi et al. 2016, arXiv:1609.05158, read backwards). If s divides the kernel, all phases have as many taps and one
nn.Conv2d computes them all. Otherwise the first ``kernel % s`` phases have one tap more than the others, and there is
one nn.Conv2d for each number of taps along each axis (at most four): no weight is ever a padded zero, and the weights
are exactly as many as torch's.
"""

import itertools
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)

from .base import PreparedModule, bare, conv2d, parameter


@dataclass(frozen=True)
class _Axis:
    """One axis of a transposed convolution."""

    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def phases(self) -> list[tuple[int, int, int]]:
        """First phase, one past the last, and taps of each run of phases with as many taps; none without taps."""
        if self.stride == 1:
            return [(0, 1, self.kernel)]
        more, taps = self.kernel % self.stride, self.kernel // self.stride
        runs = [(0, more, taps + 1), (more, self.stride, taps)]
        return [run for run in runs if run[0] < run[1] and run[2] > 0]

    @property
    def reach(self) -> int:
        """Inputs before its own that an output of the phase with most taps sees."""
        return self.dilation * (self.phases[0][2] - 1)

    def window(self, size: int, output: int) -> tuple[int, int, int]:
        """Of an input of `size`: inputs to add before and after it (negative to drop), and outputs to drop first."""
        first, last = self.padding // self.stride, (output - 1 + self.padding) // self.stride
        return self.reach - first, last - (size - 1), self.padding - first * self.stride


class PreparedConvTranspose(PreparedModule, nn.modules.conv._ConvTransposeNd):
    """What both share: the children ``convs.0`` and on, one for each number of taps along the axes."""

    convs: nn.ModuleList

    @classmethod
    def why_not(cls, module: nn.modules.conv._ConvTransposeNd) -> str | None:
        if any(s > 1 and d > 1 for s, d in zip(module.stride, module.dilation, strict=True)):
            return f"it has stride {module.stride} and dilation {module.dilation}, but one of them must be 1"
        return None

    @classmethod
    def prepare(cls, module: Any) -> Self:
        new: Any = bare(cls, module)
        rows, columns = _axes(module)
        # torch has [in, out / groups, kernel], a plain convolution [out, in / groups, kernel].
        weight = module.weight.detach()
        weight = weight if weight.ndim == 4 else weight.unsqueeze(2)
        grouped = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)  # [groups, out / groups, in / groups, ...]
        new.convs = nn.ModuleList()
        for (top, bottom, _), (left, right, _) in itertools.product(rows.phases, columns.phases):
            phases = [
                grouped[..., i :: rows.stride, j :: columns.stride].flip(-2, -1)
                for i in range(top, bottom)
                for j in range(left, right)
            ]
            # Channels are [groups, out / groups, phases].
            matrix = torch.stack(phases, dim=2).flatten(0, 2)
            bias = None
            if module.bias is not None:
                bias = parameter(module.bias.detach().repeat_interleave(len(phases)), like=module.bias)
            dilation = (rows.dilation, columns.dilation)
            conv = conv2d(parameter(matrix, like=module.weight), bias, groups=module.groups, dilation=dilation)
            new.convs.append(conv)
        # Outputs that no tap reaches are the bias alone.
        lonely: Any = module.bias if any(axis.kernel < axis.stride for axis in (rows, columns)) else None
        alone = None if lonely is None else parameter(lonely.detach().clone(), like=lonely)
        new.register_parameter("bias_alone", alone)
        return new

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        rows, columns = _axes(self)
        first: Any = self.convs[0]
        shape = (self.groups, self.out_channels // self.groups, self.in_channels // self.groups)
        whole = first.weight.new_zeros(*shape, rows.kernel, columns.kernel)
        runs = itertools.product(rows.phases, columns.phases)
        for conv, ((top, bottom, _), (left, right, _)) in zip(self.convs, runs, strict=True):
            width = right - left
            part: Any = conv.weight
            part = part.unflatten(0, (*shape[:2], -1)).flip(-2, -1)
            for i, j in itertools.product(range(top, bottom), range(left, right)):
                whole[..., i :: rows.stride, j :: columns.stride] = part[:, :, (i - top) * width + j - left]
        whole = whole.transpose(1, 2).flatten(0, 1)
        return whole if len(self.kernel_size) == 2 else whole.squeeze(2)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        first: Any = self.convs[0]
        return None if first.bias is None else first.bias.unflatten(0, (self.out_channels, -1))[:, 0]

    def _transposed(self, x: Tensor, output_size: list[int] | None) -> Tensor:
        """Of x [batch or none, channels, height, width]; sizes of both axes, or of the last one for a 1d module."""
        rows, columns = _axes(self)
        dims = len(self.kernel_size)
        inner = x if dims == 2 else x.squeeze(-2)
        more = self._output_padding(
            inner,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            dims,
            self.dilation,  # type: ignore[arg-type]
        )
        more = more if dims == 2 else [0, *more]
        sizes = [
            (size - 1) * axis.stride - 2 * axis.padding + axis.dilation * (axis.kernel - 1) + 1 + extra
            for size, axis, extra in zip(x.shape[-2:], (rows, columns), more, strict=True)
        ]
        if min(sizes) <= 0 or 0 in x.shape[-3:]:
            raise RuntimeError(
                f"Given input size {list(inner.shape)}, calculated output size {sizes[2 - dims :]} is too small"
            )
        windows = [axis.window(size, out) for axis, size, out in zip((rows, columns), x.shape[-2:], sizes, strict=True)]
        (top, bottom, first_row), (left, right, first_column) = windows
        if any((top, bottom, left, right)):
            x = F.pad(x, (left, right, top, bottom))
        y = _interleave(self._phases(x, rows, columns))
        return y[..., first_row : first_row + sizes[0], first_column : first_column + sizes[1]]

    def _phases(self, x: Tensor, rows: _Axis, columns: _Axis) -> Tensor:
        """[batch or none, out, phases down, phases across, h, w]: every phase at every place."""
        bands: list[Tensor] = []
        convs = iter(self.convs)
        for top, bottom, down in rows.phases:
            late_row = rows.reach - rows.dilation * (down - 1)
            parts: list[Tensor] = []
            for left, right, across in columns.phases:
                late_column = columns.reach - columns.dilation * (across - 1)
                y: Tensor = next(convs)(x[..., late_row:, late_column:])
                parts.append(y.unflatten(-3, (self.out_channels, bottom - top, right - left)))
            bands.append(self._filled(parts, -3, columns.stride))
        return self._filled(bands, -4, rows.stride)

    def _filled(self, parts: list[Tensor], dim: int, phases: int) -> Tensor:
        """The runs of phases along an axis as one tensor, and those that no tap reaches."""
        missing = phases - sum(part.shape[dim] for part in parts)
        if missing:
            shape = list(parts[0].shape)
            shape[dim] = missing
            alone = parts[0].new_zeros(shape)
            bias: Any = self.bias_alone
            parts = [*parts, alone if bias is None else alone + bias.view(-1, 1, 1, 1, 1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _interleave(maps: Tensor) -> Tensor:
    """[..., phases down, phases across, h, w] as [..., h * phases down, w * phases across]."""
    down, across, height, width = maps.shape[-4:]
    maps = maps.transpose(-4, -3).transpose(-3, -2)  # [..., across, h, down, w]
    return maps.movedim(-4, -1).reshape(*maps.shape[:-4], height * down, width * across)


class PreparedConvTranspose1d(PreparedConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` on plain convolutions over images of height one.

    Example:
        >>> PreparedConvTranspose1d.prepare(nn.ConvTranspose1d(4, 8, 4, stride=2))(torch.randn(2, 4, 5)).shape
        torch.Size([2, 8, 12])
    """

    kind = "conv_transpose1d"
    replaces = nn.ConvTranspose1d

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self._transposed(input.unsqueeze(-2), output_size).squeeze(-2)


class PreparedConvTranspose2d(PreparedConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` on plain convolutions.

    Example:
        >>> up = PreparedConvTranspose2d.prepare(nn.ConvTranspose2d(4, 8, 3, stride=2))
        >>> up(torch.randn(2, 4, 5, 5)).shape, [tuple(conv.kernel_size) for conv in up.convs]
        (torch.Size([2, 8, 11, 11]), [(2, 2), (2, 1), (1, 2), (1, 1)])
    """

    kind = "conv_transpose2d"
    replaces = nn.ConvTranspose2d

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self._transposed(input, output_size)


def _axes(module: Any) -> tuple[_Axis, _Axis]:
    """Rows and columns; a 1d module has one row."""
    settings = (module.kernel_size, module.stride, module.padding, module.dilation)
    axes = [_Axis(*values) for values in zip(*settings, strict=True)]
    return (_Axis(1, 1, 0, 1), axes[0]) if len(axes) == 1 else (axes[0], axes[1])
