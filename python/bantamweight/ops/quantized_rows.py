"""Activations rounded to int8 once, for every packed layer that reads them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from ..errors import BantamweightError
from .lowbit_linear import check_input, check_status

ROW_SLACK = 64  # bytes behind the last row that a kernel may read


@dataclass(kw_only=True, eq=False, slots=True)
class QuantizedRows:
    """Rows of k activations as int8 against each row's own absolute maximum: ``x = q * scale``.

    Made by `quantize_rows` and by the fused layers; `nn.PackedLinear` and they take it in place of a float tensor.
    """

    q: Tensor  # int8 [rows * row_bytes + ROW_SLACK]; row r is q[r * row_bytes :][:k], zeros behind it
    scale: Tensor  # float32 [rows]
    sums: Tensor  # int32 [rows, groups]: of q over each group
    shape: torch.Size  # [..., k], of the float tensor
    group_size: int

    @classmethod
    def empty(cls, shape: torch.Size, group_size: int) -> "QuantizedRows":
        """Room for the rows of a tensor of this shape."""
        k = shape[-1]
        m = shape[:-1].numel()
        return cls(
            q=torch.empty(m * _C.padded_row_bytes(k) + ROW_SLACK, dtype=torch.int8, device="cpu"),
            scale=torch.empty(m, dtype=torch.float32, device="cpu"),
            sums=torch.empty((m, -(-k // group_size)), dtype=torch.int32, device="cpu"),
            shape=shape,
            group_size=group_size,
        )

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        """Of q, scale and sums, and the group size: what the extension takes."""
        return self.q.data_ptr(), self.scale.data_ptr(), self.sums.data_ptr(), self.group_size

    def dequantize(self) -> Tensor:
        """float32 [..., k]."""
        k = self.shape[-1]
        row_bytes = _C.padded_row_bytes(k)
        m = len(self.scale)
        codes = self.q[: m * row_bytes].view(m, row_bytes)[:, :k]
        return (codes * self.scale[:, None]).view(self.shape)


def quantize_rows(x: Tensor, group_size: int | None = None) -> QuantizedRows:
    """Rounds the rows of x [..., k] to int8, as every packed linear layer does on its way in.

    Args:
        x: float32, bfloat16 or float16 on the CPU.
        group_size: of the layers that will read the rows, which saves them a pass over the codes; None for one
            group a row. Any layer takes rows of any group size, with equal results.

    Raises:
        BantamweightError: x is not such a tensor, or the group size is not positive.
        KernelError: x holds NaN or infinity.

    Example:
        >>> import torch
        >>> from bantamweight.ops import quantize_rows
        >>> x = torch.tensor([[0.5, -1.0, 0.25]])
        >>> rows = quantize_rows(x)
        >>> rows.q[:3].tolist()
        [64, -127, 32]
    """
    k = x.shape[-1] if x.ndim else 0
    group_size = max(k, 1) if group_size is None else group_size
    if group_size < 1:
        raise BantamweightError(f"quantize_rows: group_size is {group_size}, but must be at least 1, or None")
    floats = check_input(x.detach(), k, "quantize_rows")
    rows = QuantizedRows.empty(x.shape, group_size)
    q, scale, sums, _ = rows.addresses
    check_status(
        _C.quantize_rows(floats.data_ptr(), k, len(rows.scale), k, group_size, q, scale, sums, ""), "quantize_rows"
    )
    return rows


def layer_norm_rows(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    group_size: int | None = None,
) -> tuple[Tensor, QuantizedRows]:
    """``torch.nn.functional.layer_norm(x + residual, ...)`` over the last dimension, and its rows rounded to int8.

    Args:
        x: float32, bfloat16 or float16 [..., k] on the CPU.
        weight, bias: [k] or None.
        residual: of the shape of x, added to it first.
        group_size: as of `quantize_rows`.

    Returns:
        The normalised float32 tensor [..., k], and the same as `QuantizedRows`.

    Raises:
        BantamweightError: an argument has another shape, dtype or device.
        KernelError: x holds NaN or infinity.

    Example:
        >>> import torch
        >>> from bantamweight.ops import layer_norm_rows
        >>> y, rows = layer_norm_rows(torch.randn(4, 32))
        >>> rows.shape
        torch.Size([4, 32])
    """
    k = x.shape[-1] if x.ndim else 0
    floats = check_input(x.detach(), k, "layer_norm_rows")
    parts = []
    for name, part, shape in (("weight", weight, (k,)), ("bias", bias, (k,)), ("residual", residual, tuple(x.shape))):
        if part is not None and tuple(part.shape) != shape:
            raise BantamweightError(f"layer_norm_rows: {name} is {list(part.shape)}, but must be {list(shape)} or None")
        parts.append(None if part is None else check_input(part.detach(), k, f"layer_norm_rows: {name}"))
    scale, shift, added = (0 if part is None else part.data_ptr() for part in parts)
    y = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    m = x.shape[:-1].numel()
    status = _C.layer_norm(floats.data_ptr(), k, added, k, m, k, scale, shift, eps, y.data_ptr(), k, "")
    check_status(status, "layer_norm_rows")
    return y, quantize_rows(y, group_size)
