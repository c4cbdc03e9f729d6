"""The one contract: every quantizer makes a QuantizedWeight; every kernel, file and exporter takes one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import BantamweightError
from .io.bitpack import bits_for, packing_for


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A matrix of small codes with a scale and a zero for every group of columns in every row.

    ``W[n, k] ~= scale[n, g] * (codes[n, k] - zero[n, g])`` with ``g = k // group_size``. The last group
    may be shorter. A convolution's row is ``k = (ky * kw + kx) * cin + c``, channels last (`conv_matrix`).

    Attributes:
        codes: uint8 [out, in], values 0 .. levels - 1.
        scale: float32 [out, n_groups], in units of the weight.
        zero: float32 [out, n_groups], in units of a code.
        levels: values a code may take, 2 .. 256; 3 is ternary.
        group_size: columns a group; `in` (or more) for one group a row.

    Raises:
        BantamweightError: a part has another dtype or shape, a code is not below `levels`, or a scale or zero is
            not finite.

    Example:
        >>> import torch
        >>> codes = torch.tensor([[0, 1, 2], [2, 1, 0]], dtype=torch.uint8)
        >>> w = QuantizedWeight.from_codes(codes, scale=0.5, zero=1.0, levels=3)
        >>> w.dequantize()
        tensor([[-0.5000,  0.0000,  0.5000],
                [ 0.5000,  0.0000, -0.5000]])
        >>> w
        QuantizedWeight(ternary, 2x3)
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    levels: int
    group_size: int

    def __post_init__(self) -> None:
        if not isinstance(self.codes, Tensor) or self.codes.dtype != torch.uint8 or self.codes.ndim != 2:
            raise BantamweightError(
                f"codes are {_describe(self.codes)}, but must be a uint8 tensor [out, in]; "
                "reshape a convolution with weights.conv_matrix and convert with .to(torch.uint8)"
            )
        if not isinstance(self.levels, int) or not 2 <= self.levels <= 256:
            raise BantamweightError(f"levels is {self.levels!r}, but a code has 2 to 256 levels (3 for ternary)")
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise BantamweightError(
                f"group_size is {self.group_size!r}, but must be a whole number of columns from 1; "
                "leave it out for one group a row"
            )
        for name, part in (("scale", self.scale), ("zero", self.zero)):
            expected = (self.out_features, self.n_groups)
            if not isinstance(part, Tensor) or part.dtype != torch.float32 or tuple(part.shape) != expected:
                raise BantamweightError(
                    f"{name} is {_describe(part)}, but {self.out_features} rows of {self.in_features} columns in "
                    f"groups of {self.group_size} need a float32 tensor {list(expected)}"
                )
            if not bool(torch.isfinite(part).all()):
                raise BantamweightError(
                    f"{name} holds NaN or infinity, but must be finite; look for NaN in the weights it came from"
                )
        if self.codes.numel() > 0 and int(self.codes.max()) >= self.levels:
            raise BantamweightError(
                f"a code is {int(self.codes.max())}, but codes of {self.levels} levels go from 0 to {self.levels - 1}; "
                "clamp the codes or raise levels"
            )

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor | float,
        zero: Tensor | float,
        *,
        group_size: int | None = None,
        levels: int | None = None,
    ) -> QuantizedWeight:
        """Checks the parts and broadcasts the scale and the zero to one a row and group.

        Args:
            codes: uint8 [out, in].
            scale, zero: numbers, or real tensors [out], [out, 1] or [out, n_groups].
            group_size: columns a scale; None for one scale a row.
            levels: values a code may take; None for the fewest of 3, 4, 8, 16 and 256 that hold every code.

        Raises:
            BantamweightError: as the class says.
        """
        if not isinstance(codes, Tensor) or codes.dtype != torch.uint8 or codes.ndim != 2:
            raise BantamweightError(
                f"codes are {_describe(codes)}, but must be a uint8 tensor [out, in]; "
                "reshape a convolution with weights.conv_matrix and convert with .to(torch.uint8)"
            )
        n, k = codes.shape
        if group_size is None or (isinstance(group_size, int) and group_size > k):
            group_size = max(k, 1)
        if levels is None:
            greatest = int(codes.max()) if codes.numel() > 0 else 0
            levels = next(count for count in (3, 4, 8, 16, 256) if greatest < count)
        # A wrong group size is reported by the constructor; here it must only not divide by zero.
        groups = -(-k // group_size) if isinstance(group_size, int) and group_size > 0 else 1
        return cls(
            codes=codes.detach().contiguous(),
            scale=_per_group(scale, n, groups, codes.device),
            zero=_per_group(zero, n, groups, codes.device),
            levels=levels,
            group_size=group_size,
        )

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def n_groups(self) -> int:
        return -(-self.in_features // self.group_size)

    @property
    def bits(self) -> int:
        """Bits a code in memory: 2, 3, 4 or 8."""
        return bits_for(self.levels)

    @property
    def scheme(self) -> str:
        """`ternary` or `W2` .. `W8`, with `-g128` where a row has several groups."""
        name = "ternary" if self.levels == 3 else f"W{self.bits}"
        return f"{name}-g{self.group_size}" if self.n_groups > 1 else name

    @property
    def uniform_zero(self) -> float | None:
        """The zero of every group if they are all the same, else None; a file stores it once."""
        if self.zero.numel() == 0:
            return 0.0
        first = self.zero.reshape(-1)[0]
        return float(first) if bool((self.zero == first).all()) else None

    @property
    def nbytes_on_disk(self) -> int:
        """Bytes of the tensors that a saved file holds for this weight."""
        codes = self.out_features * packing_for(self.levels).row_bytes(self.in_features)
        return codes + 4 * self.scale.numel() * (1 if self.uniform_zero is not None else 2)

    def dequantize(self) -> Tensor:
        """The float32 [out, in] matrix that the codes stand for."""
        n, k = self.codes.shape
        if self.codes.numel() > 0 and k % self.n_groups == 0 and k // self.n_groups == min(self.group_size, k):
            groups = self.codes.to(torch.float32).view(n, self.n_groups, -1)
            return groups.sub_(self.zero.unsqueeze(-1)).mul_(self.scale.unsqueeze(-1)).view(n, k)
        group = torch.arange(k, device=self.codes.device) // self.group_size
        return self.scale[:, group] * (self.codes.to(torch.float32) - self.zero[:, group])

    def equals(self, other: QuantizedWeight) -> bool:
        """True if every part is the same to the last bit."""
        return (
            (self.levels, self.group_size) == (other.levels, other.group_size)
            and torch.equal(self.codes, other.codes)
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero, other.zero)
        )

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        return QuantizedWeight(
            codes=self.codes.to(device),
            scale=self.scale.to(device),
            zero=self.zero.to(device),
            levels=self.levels,
            group_size=self.group_size,
        )

    def __repr__(self) -> str:
        return f"QuantizedWeight({self.scheme}, {self.out_features}x{self.in_features})"


@dataclass(frozen=True, kw_only=True)
class ConvGeometry:
    """A convolution's arguments, as nn.Conv2d names them."""

    in_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)  # or "same"
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, conv: Any) -> ConvGeometry:
        """Reads the arguments off an nn.Conv2d, or off a quantized one."""
        padding = conv.padding
        return cls(
            in_channels=conv.in_channels,
            kernel_size=pair(conv.kernel_size),
            stride=pair(conv.stride),
            padding=(0, 0) if padding == "valid" else padding if isinstance(padding, str) else pair(padding),
            dilation=pair(conv.dilation),
            groups=conv.groups,
            padding_mode=conv.padding_mode,
        )

    @property
    def columns(self) -> int:
        """Columns of the weight's matrix."""
        return self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]

    def rounded_together(self, out_channels: int) -> tuple[int, ...]:
        """The dimensions of an input [n, c, h, w] that share one int8 scale in the packed form; () if it stays float.

        A 1x1 convolution is a linear layer over pixels, and each pixel has a scale of its own; else an image has one. A
        depthwise convolution, which memory bounds, takes floats.
        """
        if 1 < self.groups == self.in_channels == out_channels:
            return ()
        padded = self.padding_mode == "zeros" and any(self.sides)
        return (-3,) if self.kernel_size == (1, 1) and self.groups == 1 and not padded else (-3, -2, -1)

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """Padding left, right, top and bottom, as torch.nn.functional.pad orders it."""
        if not isinstance(self.padding, str):
            return (self.padding[1], self.padding[1], self.padding[0], self.padding[0])
        # "same": the odd one goes to the right and to the bottom, as in torch
        height, width = (d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))
        return (width // 2, width - width // 2, height // 2, height - height // 2)

    def check(self, weight: QuantizedWeight) -> None:
        """Refuses a weight whose rows are not those of this convolution, and arguments torch would refuse."""
        (kh, kw), groups = self.kernel_size, self.groups
        if groups < 1 or self.in_channels % groups or weight.out_features % groups:
            raise BantamweightError(
                f"a convolution of {self.in_channels} to {weight.out_features} channels does not divide into "
                f"{groups} groups; pass the groups of the layer"
            )
        if weight.in_features != self.columns:
            raise BantamweightError(
                f"a weight of {weight.out_features}x{weight.in_features} came for a {kh}x{kw} convolution of "
                f"{self.in_channels} channels in {groups} groups, whose matrix has {self.columns} columns; "
                "pass the weight of this layer"
            )
        if isinstance(self.padding, str) and (self.padding != "same" or self.stride != (1, 1)):
            raise BantamweightError(
                f"padding is {self.padding!r} with stride {self.stride}, but must be two sizes, 'valid', or 'same' "
                "with stride 1; pass the sizes"
            )


def conv_matrix(weight: Tensor) -> Tensor:
    """A convolution's weight [o, c, kh, kw] as the matrix [o, kh * kw * c], channels last."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def conv_weight(matrix: Tensor, kh: int, kw: int) -> Tensor:
    """The inverse of `conv_matrix`: [o, kh * kw * c] as [o, c, kh, kw]."""
    o, k = matrix.shape
    if kh < 1 or kw < 1 or k % (kh * kw) != 0:
        raise BantamweightError(f"{k} columns do not split into a {kh}x{kw} kernel; pass the kernel size of the layer")
    weight = matrix.reshape(o, kh, kw, k // (kh * kw)).permute(0, 3, 1, 2)
    # A 1x1 kernel counts as contiguous whatever its strides are, but torch takes channels-last ones for a wish.
    return weight.clone(memory_format=torch.contiguous_format)


def _per_group(value: Tensor | float, n: int, groups: int, device: torch.device) -> Tensor:
    """float32 [n, groups] where the value broadcasts to it, else the value as it is, for the constructor to refuse."""
    part = torch.as_tensor(value, device=device).detach()
    if part.is_complex() or part.dtype == torch.bool:
        return part
    part = part.to(torch.float32)
    column = part.reshape(-1, 1) if part.ndim <= 1 else part
    if column.ndim == 2 and column.shape[0] in (1, n) and column.shape[1] in (1, groups):
        return column.expand(n, groups).contiguous()
    return part


def pair(value: Any) -> tuple[int, int]:
    """A size given once or twice, as torch allows, as two."""
    first, second = value if isinstance(value, tuple | list) else (value, value)
    return (int(first), int(second))


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
