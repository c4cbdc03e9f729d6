"""Convolution, rectifier and batch normalisation with lean second derivatives, for exact Hessian-vector products.

torch differentiates the gradient of batch normalisation by some thirty elementwise operations on whole activations;
here it is one kernel that reads each channel twice, or two calls of the fused first derivative and six operations. It
differentiates the gradient of a convolution by convolutions of transposed tensors; here they are two ordinary ones
and the two halves of the fused first derivative. It adds zeros to the gradient before every rectifier; here none.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)
from torch.overrides import TorchFunctionMode

from .. import _C
from ..ops.lowbit_linear import check_status

_batch_norm_backward = torch.ops.aten.native_batch_norm_backward
_convolution_backward = torch.ops.aten.convolution_backward
_threshold_backward = torch.ops.aten.threshold_backward


@cache
def keep_freed_memory() -> None:
    """Raises, once, glibc's limit of free memory at the end of its heap; above it, the end goes back to the system.

    The limit is twice the largest mapped block freed so far, of 32 MiB at most: a few MiB where activations are
    small. The graph of a gradient is freed at every step, so most of it would be given back and, page by page, be
    had and cleared again: 50 thousand faults a step of ResNet-20. One block that nobody touches raises it to 64 MiB.
    """
    torch.empty((32 << 20) - (16 << 10), dtype=torch.uint8)


class LeanSecondDerivatives(TorchFunctionMode):
    """Within this context F.conv2d, F.relu, and F.batch_norm in training mode, are those below where `_applies`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func is F.conv2d:
            return _conv2d(*args, **kwargs)
        if func is F.relu or func is torch.relu or func is Tensor.relu:
            return _relu(*args, **kwargs)
        return func(*args, **kwargs)


def _applies(*tensors: Tensor | None) -> bool:
    """Plain tensors of one float type on the CPU: no autocast, no subclasses, no functorch transforms.

    Nor saved-tensor hooks: activation checkpointing runs its part again outside this context, and must find the same.
    """
    present = [t for t in tensors if t is not None]
    dtype = present[0].dtype
    return (
        dtype in (torch.float32, torch.float64)
        and present[0].device.type == "cpu"  # where it was measured
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.dtype == dtype for t in present)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None  # pyright: ignore
    )


# ---- convolution ----------------------------------------------------------------------------------------------


def _conv2d(
    input: Tensor,  # the parameters' names and order are torch's
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or input.ndim != 4 or not _applies(input, weight, bias):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]
    return _Conv2d.apply(input, weight, bias, (_pair(stride), _pair(padding), _pair(dilation), groups))  # type: ignore


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else [int(v) for v in value] * (2 // len(value))


class _Conv2d(torch.autograd.Function):
    """y = conv(x, W) + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Any) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.shape, ctx.has_bias = shape, bias is not None
        return F.conv2d(x, weight, bias, *shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2])
        return *_Conv2dBackward.apply(dy, *ctx.saved_tensors, ctx.shape, needs), None  # type: ignore[misc]


class _Conv2dBackward(torch.autograd.Function):
    """dx, dW and dbias: the transposed convolution of dy with W, the correlation of x with dy, the sum of dy."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, shape: Any, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(dy, x, weight)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        return _conv2d_gradients(dy, x, weight, shape, needs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, u: Tensor | None, v: Tensor | None, q: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of <u, dx> + <v, dW> + <q, dbias>: <u, dx> = <conv(u, W), dy>, <v, dW> = <conv(x, v), dy>."""
        dy, x, weight = ctx.saved_tensors
        to_dy = to_x = to_weight = None
        for image, kernel in ((u, weight), (x, v)):
            if image is not None and kernel is not None:
                part = F.conv2d(image, kernel, None, *ctx.shape)
                to_dy = part if to_dy is None else to_dy.add_(part)
        if q is not None:
            shift = q.view(1, -1, 1, 1)
            to_dy = shift.expand_as(dy) if to_dy is None else to_dy.add_(shift)
        if v is not None and ctx.needs_input_grad[1]:
            to_x = _conv2d_gradients(dy, x, v, ctx.shape, (True, False, False))[0]
        if u is not None and ctx.needs_input_grad[2]:
            to_weight = _conv2d_gradients(dy, u, weight, ctx.shape, (False, True, False))[1]
        return to_dy, to_x, to_weight, None, None


def _conv2d_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, shape: Any, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    stride, padding, dilation, groups = shape
    sizes = [weight.shape[0]] if needs[2] else None
    return _convolution_backward(dy, x, weight, sizes, stride, padding, dilation, False, [0, 0], groups, list(needs))


# ---- rectifier ------------------------------------------------------------------------------------------------


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    if inplace or not _applies(input):
        return F.relu(input, inplace)
    return _ReLU.apply(input)  # type: ignore[return-value]


class _ReLU(torch.autograd.Function):
    """y = max(x, 0), whose gradient does not depend on x, where torch adds zeros of its size to x's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        y = torch.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return _ReLUBackward.apply(dy, ctx.saved_tensors[0].detach())  # type: ignore[return-value]


class _ReLUBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(y)
        return _threshold_backward(dy, y, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _threshold_backward(u, ctx.saved_tensors[0], 0), None


# ---- batch normalisation --------------------------------------------------------------------------------------


def _batch_norm(
    input: Tensor,  # the parameters' names and order are torch's
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    several = input.numel() > input.shape[1] if input.ndim > 1 else False  # one value has no variance: torch refuses
    if training and several and _applies(input, running_mean, running_var, weight, bias):
        return _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)  # type: ignore[return-value]
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


class _BatchNorm(torch.autograd.Function):
    """y = weight * xhat + bias, xhat = (x - mean) r."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, r = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, r)
        ctx.eps, ctx.affine = eps, weight is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx, dweight, dbias = _BatchNormBackward.apply(dy, *ctx.saved_tensors, ctx.eps)  # type: ignore[misc]
        return dx, *((dweight, dbias) if ctx.affine else (None, None)), None, None, None, None


class _BatchNormBackward(torch.autograd.Function):
    """dx = weight r P dy with P dy = dy - <dy> - xhat <dy xhat>; dweight = N <dy xhat>, dbias = N <dy>.

    <.> is the mean over a channel's N values. P is symmetric, so its own transpose.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, r: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx, dweight, dbias = _batch_norm_backward(dy, x, weight, None, None, mean, r, True, eps, [True, True, True])
        ctx.save_for_backward(dy, x, weight, mean, r, dweight, dbias)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return dx, dweight, dbias

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, u: Tensor | None, p: Tensor | None, q: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of <u, dx> + <p, dweight> + <q, dbias>, where u, p, q may be absent."""
        dy, x, weight, mean, r, dweight, dbias = ctx.saved_tensors
        if u is None and p is None:
            return (None if q is None else _per_channel(q, dy).expand_as(dy)), None, None, None, None, None
        tensors = (u, dy, x, mean, r, weight, dweight, dbias, p, q)
        if x.ndim > 2 and all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in tensors):
            return *_fused_second(*tensors), None, None, None
        count = x.numel() // x.shape[1]

        def project(t: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            return _batch_norm_backward(t, x, scale, None, None, mean, r, True, ctx.eps, [True, True, True])

        scale = torch.ones_like(r) if weight is None else weight
        along_u, along_dy = torch.zeros_like(r), torch.zeros_like(r)  # h = along_u u + along_dy dy = d/dxhat
        to_dy = to_weight = stretch = None
        if u is not None:
            to_dy, u_xhat, u_sum = project(u, weight)  # P is symmetric
            s = (u * dy).sum([d for d in range(x.ndim) if d != 1])
            # <u, dx> = weight r inner, and r depends on x, too: dr/dx = -r^2 xhat / N.
            inner = s - (u_sum * dbias + u_xhat * dweight) / count
            to_weight = None if weight is None else r * inner
            stretch = -scale * r * r * inner / count
            along_u, along_dy = -scale * r * dweight / count, -scale * r * u_xhat / count
        if p is not None:
            along_dy = along_dy + p
        h = dy * _per_channel(along_dy, x)
        if u is not None:
            h.addcmul_(u, _per_channel(along_u, x))
        to_x = project(h, None)[0]
        if stretch is not None:
            to_x.addcmul_(x - _per_channel(mean, x), _per_channel(stretch * r, x))
        if p is not None:
            linear = (x - _per_channel(mean, x)) * _per_channel(p * r, x)
            to_dy = linear if to_dy is None else to_dy.add_(linear)
        if q is not None and to_dy is not None:
            to_dy = to_dy.add_(_per_channel(q, x))
        return to_dy, to_x, to_weight, None, None, None


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.ndim - 2))


def _fused_second(
    u: Tensor | None,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    r: Tensor,
    weight: Tensor | None,
    dweight: Tensor,
    dbias: Tensor,
    p: Tensor | None,
    q: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """to_dy, to_x and to_weight of contiguous float32 tensors, each channel in one go."""
    to_dy, to_x, to_weight = torch.empty_like(x), torch.empty_like(x), torch.empty_like(r)
    n, channels = x.shape[:2]
    addresses = [0 if t is None else t.data_ptr() for t in (u, dy, x, mean, r, weight, dweight, dbias, p, q)]
    outputs = [t.data_ptr() for t in (to_dy, to_x, to_weight)]
    status = _C.batch_norm_second(*addresses[:3], n, channels, x[0, 0].numel(), *addresses[3:], *outputs, "")
    check_status(status, "batch normalisation's second derivative")
    return to_dy, to_x, None if weight is None else to_weight
