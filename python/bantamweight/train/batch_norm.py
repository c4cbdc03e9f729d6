"""Batch normalisation with a lean second derivative.

torch differentiates the gradient of batch normalisation by some thirty elementwise operations on whole activations,
which make up much of an exact Hessian-vector product of a convolutional network. Here it is two calls of the fused
first derivative and six elementwise operations.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)
from torch.overrides import TorchFunctionMode

_backward = torch.ops.aten.native_batch_norm_backward


class LeanBatchNorm(TorchFunctionMode):
    """Within this context, F.batch_norm in training mode on float32 or float64 has the lean second derivative."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


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
    floats = [t for t in (input, running_mean, running_var, weight, bias) if t is not None]
    one_type = input.dtype in (torch.float32, torch.float64) and all(type(t) in _PLAIN for t in floats)
    one_type = one_type and all(t.dtype == input.dtype for t in floats)
    if training and one_type and input.numel() > input.shape[1] and not torch._C._are_functorch_transforms_active():
        return _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)  # type: ignore[return-value]
    return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


_PLAIN = (Tensor, torch.nn.Parameter)


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
        dx, dweight, dbias = _backward(dy, x, weight, None, None, mean, r, True, eps, [True, True, True])
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
            return _backward(t, x, scale, None, None, mean, r, True, ctx.eps, [True, True, True])

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
