"""The loss on a random plane through the trained weights (Li et al., 2018, arXiv 1712.09913): how wide the minimum is.

Distances are relative to the weights, so that networks trained differently can be laid side by side;
`bantamweight.curvature.loss_surface` shows one network along its steepest directions.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)
from tqdm import tqdm

from ..errors import BantamweightError


@dataclass(frozen=True, kw_only=True, eq=False)
class FilterNormalisedSurface:
    """losses [points, points] float64 at (offsets[i], offsets[j]) along the two directions; the middle is the model."""

    offsets: Tensor
    losses: Tensor


def filter_normalised_direction(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """A random direction in which every filter (row) has the norm of the model's; biases and norm layers stay.

    So 1 means the same for two networks, however their weights are scaled (section 4 of the paper).
    """
    direction = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        weight = parameter.detach()
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        rows, noise_rows = weight.flatten(1), noise.flatten(1)
        scale = rows.norm(dim=1) / noise_rows.norm(dim=1).clamp_min(1e-12)
        direction[name] = noise * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return direction


@torch.no_grad()
def filter_normalised_surface(
    model: nn.Module, x: Tensor, y: Tensor, *, radius: float = 1.0, points: int = 11, seed: int = 0
) -> FilterNormalisedSurface:
    """Mean cross-entropy of `model`, in evaluation mode, on x [n, ...] and y [n], over points^2 displacements.

    The model itself is not touched. Raises `BantamweightError` for an even number of points.

    Example
    -------
    >>> import torch
    >>> from bantamweight.train.surface import filter_normalised_surface
    >>> x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    >>> surface = filter_normalised_surface(torch.nn.Linear(4, 3), x, y, points=3)
    >>> surface.losses.shape
    torch.Size([3, 3])
    """
    if points < 3 or points % 2 == 0:
        raise BantamweightError(
            f"points is {points}, but must be odd and at least 3, so that the model is in the middle"
        )
    model = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(seed)
    first, second = (filter_normalised_direction(model, generator) for _ in range(2))
    centre = {name: p.detach().clone() for name, p in model.named_parameters() if name in first}
    weights = {name: p for name, p in model.named_parameters() if name in first}
    # A whole number of steps to the middle, so that it is 0 and not nearly 0.
    offsets = radius * torch.arange(-(points // 2), points // 2 + 1, dtype=torch.float64) / (points // 2)
    losses = torch.empty(points, points, dtype=torch.float64)
    with tqdm(total=points**2, desc="loss surface", disable=None) as bar:
        for i, a in enumerate(offsets.tolist()):
            for j, b in enumerate(offsets.tolist()):
                for name, weight in weights.items():
                    weight.copy_(centre[name] + a * first[name] + b * second[name])
                losses[i, j] = F.cross_entropy(model(x), y)
                bar.update()
    return FilterNormalisedSurface(offsets=offsets, losses=losses)
