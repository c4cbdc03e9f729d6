"""Convolution and batch normalisation with lean second derivatives, for exact Hessian-vector products.

torch differentiates the gradient of batch normalisation by some thirty elementwise operations on whole activations;
here it is two calls of the fused first derivative and six elementwise operations. It differentiates the gradient of a
convolution by a convolution of transposed tensors and two that are added; here they are one of twice the channels and
the two halves of the fused first derivative.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)
from torch.overrides import TorchFunctionMode

_batch_norm_backward = torch.ops.aten.native_batch_norm_backward
_convolution_backward = torch.ops.aten.convolution_backward


class LeanSecondDerivatives(TorchFunctionMode):
    """Within this context F.conv2d, and F.batch_norm in training mode, are those below, where `_applies` says so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        if func is F.conv2d:
            return _conv2d(*args, **kwargs)
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
        groups = ctx.shape[-1]
        to_dy = to_x = to_weight = None
        if u is not None and v is not None and groups == 1:
            to_dy = F.conv2d(torch.cat([u, x], 1), torch.cat([weight, v], 1), q, *ctx.shape)
            q = None
        else:
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
        count = x.numel() // x.shape[1]

        def per_channel(values: Tensor) -> Tensor:
            return values.view(1, -1, *[1] * (x.ndim - 2))

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
        h = dy * per_channel(along_dy)
        if u is not None:
            h.addcmul_(u, per_channel(along_u))
        to_x = project(h, None)[0]
        if stretch is not None:
            to_x.addcmul_(x - per_channel(mean), per_channel(stretch * r))
        if p is not None:
            linear = (x - per_channel(mean)) * per_channel(p * r)
            to_dy = linear if to_dy is None else to_dy.add_(linear)
        if q is not None:
            to_dy = per_channel(q).expand_as(dy) if to_dy is None else to_dy.add_(per_channel(q))
        return to_dy, to_x, to_weight, None, None, None
