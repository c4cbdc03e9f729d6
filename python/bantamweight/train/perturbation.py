"""The ascent step of sharpness-aware training: how far, and in which direction, the weights are moved.

Each function takes weights and gradients as equally long lists and a radius per tensor, and returns the
list of displacements. Nothing here touches the weights, and nothing waits for the device.
"""
# torch._foreach_* have no public names.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_TINY = 1e-12  # the divisor's floor: a zero gradient gives a zero displacement, not NaN


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each tensor, as one vector on the first tensor's device."""
    device = tensors[0].device
    return torch.stack([norm.to(device) for norm in torch._foreach_norm(list(tensors))])


def _scaled(tensors: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """factors[i] * tensors[i]; the factors may lie on another device."""
    return list(torch._foreach_mul(list(tensors), [f.to(t) for t, f in zip(tensors, factors.unbind(), strict=True)]))


def plain(weights: Sequence[Tensor], gradients: Sequence[Tensor], radii: Sequence[float]) -> list[Tensor]:
    """e = h g / ||g||, one norm over all tensors: SAM (Foret et al., 2021, arXiv 2010.01412, eq. 2)."""
    total = norms(gradients).norm()
    return _scaled(gradients, _radii(radii, total) / total.clamp_min(_TINY))


def adaptive(weights: Sequence[Tensor], gradients: Sequence[Tensor], radii: Sequence[float]) -> list[Tensor]:
    """e = h w^2 g / || |w| g ||, one norm over all tensors: ASAM (Kwon et al., 2021, arXiv 2102.11600)."""
    weighted = list(
        torch._foreach_mul(list(weights), list(gradients))
    )  # w g has the norm of |w| g, and w (w g) = w^2 g
    total = norms(weighted).norm()
    torch._foreach_mul_(weighted, list(weights))
    return _scaled(weighted, _radii(radii, total) / total.clamp_min(_TINY))


def layerwise(weights: Sequence[Tensor], gradients: Sequence[Tensor], radii: Sequence[float]) -> list[Tensor]:
    """e_l = h ||W_l|| g_l / ||g_l||, a norm for each tensor: the text of HERO (Yang et al., 2022)."""
    per_tensor = norms(gradients)
    return _scaled(gradients, _radii(radii, per_tensor) * norms(weights) / per_tensor.clamp_min(_TINY))


def _radii(radii: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(radii, dtype=like.dtype).to(like.device, non_blocking=True)


PERTURBATIONS: dict[str, Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[float]], list[Tensor]]] = {
    "adaptive": adaptive,
    "layerwise": layerwise,
    "plain": plain,
}
