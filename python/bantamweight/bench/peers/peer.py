"""What a peer is, and the group-wise rounding that several of them share."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Source:
    """The float32 weight [out, in] that peers round, each in its own way.

    Example:
        >>> source = Source(torch.randn(4, 8))
        >>> source.once("largest", lambda: source.weight.abs().max()) is source.once("largest", torch.empty(()).clone)
        True
    """

    weight: Tensor
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned the first time: peers for another number of threads need not round again."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def rounded(self, bits: int, group_size: int) -> "Rounded | None":
        return self.once(("rounded", bits, group_size), lambda: round_groups(self.weight, bits, group_size))


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way of another library to run one layer.

    Attributes:
        name: library first, such as "onnxruntime W4-g128".
        bits: of a weight code; 16 and 32 for floats.
        bytes: of the weight as this peer keeps it: codes and scales.
        kernel: the instruction set or implementation that ran, "" where the library does not tell.
        pool: whose worker threads it uses. They spin for a while after a call, to the cost of other pools.
        prepare: takes float32 activations [m, in] and returns the call to time; the call returns [m, out]. Whatever
            the library allows to be done beforehand (binding inputs and outputs, choosing a type) is done beforehand.
        dequantize: the float32 weight [out, in] that this peer computes with.
        max_rows: the largest batch it may be given, None for any.
    """

    name: str
    bits: int
    bytes: int
    kernel: str
    pool: str
    prepare: Callable[[Tensor], Callable[[], Tensor]]
    dequantize: Callable[[], Tensor]
    max_rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Codes around the middle of their range: weight = (codes - zero) * scale."""

    codes: Tensor  # uint8 [out, groups, group size]
    scale: Tensor  # float32 [out, groups, 1]
    bits: int

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1)

    def dequantize(self) -> Tensor:
        return ((self.codes.float() - self.zero) * self.scale).flatten(1)

    def packed(self) -> Tensor:
        """The codes [out, groups, bytes], the first one in the lowest bits of its byte."""
        if self.bits == 8:
            return self.codes
        return pack_codes(self.codes, self.bits)


def round_groups(weight: Tensor, bits: int, group_size: int) -> Rounded | None:
    """Rounds every group of columns by its absolute maximum; None if groups do not divide the columns.

    Args:
        weight: float32 [out, in].
        bits: 2, 4 or 8.
        group_size: columns a scale.
    """
    out_features, in_features = weight.shape
    if in_features % group_size:
        return None
    groups = weight.reshape(out_features, in_features // group_size, group_size)
    zero = 1 << (bits - 1)
    # At 2 bits the codes are -2 .. 1; full range below costs half the range above.
    reach = 1.5 if bits == 2 else float(zero - 1)
    # Rounded to half precision first, as OpenVINO keeps it.
    scale = (groups.abs().amax(2, keepdim=True) / reach).half().float().clamp_min(1e-6)
    codes = (groups / scale).round_().clamp_(-zero, zero - 1).add_(zero).to(torch.uint8)
    return Rounded(codes=codes, scale=scale, bits=bits)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes of 2 or 4 bits [..., n] to bytes [..., n * bits / 8], lowest bits first.

    Example:
        >>> pack_codes(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), 2).tolist()
        [[57]]
    """
    per_byte = 8 // bits
    packed = codes[..., ::per_byte].clone()
    for place in range(1, per_byte):
        packed |= codes[..., place::per_byte] << (bits * place)
    return packed
