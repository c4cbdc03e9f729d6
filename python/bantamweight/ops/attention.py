"""Attention in float32 over heads that lie side by side, as the linear layers around it read and write them."""

import torch
from torch import Tensor

from .. import _C
from ..errors import BantamweightError
from .lowbit_linear import check_status


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    bfloat16: bool = False,
) -> Tensor:
    """softmax(q k^T scale + mask) v of every head (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    Nothing is transposed or copied around it. For inference: no gradient passes.

    Args:
        q: float32 [batch, queries, heads * head_size] on the CPU; the last dimension contiguous, others as they are.
        k, v: [batch, keys, heads * head_size], alike.
        heads: number of heads.
        mask: None, or broadcastable to [batch, heads, queries, keys]: bool (True takes part) or float, added to the
            scaled scores; -infinity hides a key, and a query that sees no key gives zeros.
        scale: None for 1 / sqrt(head_size).
        bfloat16: True lets the two products round what they multiply to bfloat16, which CPUs with AMX do faster;
            sums and softmax stay float32.

    Returns:
        [batch, queries, heads * head_size], contiguous.

    Raises:
        BantamweightError: the tensors do not fit together.
        KernelError: a score is NaN or infinite, or the mask holds NaN or +infinity.

    Example:
        >>> import torch
        >>> from bantamweight.ops import attention
        >>> q, k, v = torch.randn(2, 5, 3 * 32).split(32, dim=-1)
        >>> attention(q, k, v, heads=4).shape
        torch.Size([2, 5, 32])
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype is not torch.float32 or not x.is_cpu or x.ndim != 3:
            raise BantamweightError(
                f"attention takes float32 [batch, tokens, width] on the CPU, but {name} is {x.dtype} {list(x.shape)} "
                f"on {x.device}"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise BantamweightError(f"attention is for inference, but {name} requires a gradient; use torch.no_grad()")
    batch, queries, width = q.shape
    keys = k.shape[1]
    if k.shape != (batch, keys, width) or v.shape != k.shape or heads < 1 or width % heads:
        raise BantamweightError(
            f"attention of {heads} heads takes q [batch, queries, width] and k, v [batch, keys, width], the width a "
            f"multiple of the heads, but {list(q.shape)}, {list(k.shape)} and {list(v.shape)} came"
        )
    size = width // heads
    q, k, v = (x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous() for x in (q, k, v))
    added = (0, 0, 0, 0)
    if mask is not None:
        mask = _additive(mask, (batch, heads, queries, keys))
        added = (mask.data_ptr(), mask.stride(0), mask.stride(1), mask.stride(2))
    out = torch.empty((batch, queries, width), dtype=torch.float32, device="cpu")
    status = _C.attention(
        *((x.data_ptr(), x.stride(0), x.stride(1)) for x in (q, k, v)),
        added,
        (batch, heads, queries, keys, size),
        size**-0.5 if scale is None and size else scale or 0.0,
        bfloat16,
        (out.data_ptr(), queries * width, width),
    )
    check_status(status, f"attention of {heads} heads over {keys} keys")
    return out


def _additive(mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The mask as floats to add, of this shape, its keys next to each other; other dimensions may be repeated."""
    if mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    if not mask.is_floating_point() or not mask.is_cpu:
        raise BantamweightError(f"attention takes a bool or float mask on the CPU, but {mask.dtype} {mask.device} came")
    try:
        mask = mask.float().expand(shape)
    except RuntimeError:
        raise BantamweightError(
            f"attention takes a mask that broadcasts to [batch, heads, queries, keys], here {list(shape)}, but "
            f"{list(mask.shape)} came"
        ) from None
    return mask if mask.stride(-1) == 1 or shape[-1] <= 1 else mask.contiguous()
