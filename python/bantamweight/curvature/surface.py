"""The loss along two directions in weight space, usually the top eigenvectors, as Q-BERT's figures show it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from bantamweight.curvature.batches import as_batches, evaluation
from bantamweight.curvature.eigenvalues import Eigenvalues
from bantamweight.curvature.mean_loss import LossFunction
from bantamweight.curvature.result import Result
from bantamweight.errors import BantamweightError


@dataclass(frozen=True, kw_only=True, eq=False)
class LossSurface(Result):
    """loss[i, j] at weights + steps[i] * vector 0 + steps[j] * vector 1 (unit vectors)."""

    steps: np.ndarray  # [points]
    loss: np.ndarray  # [points, points]
    curvatures: tuple[float, float]  # the eigenvalues of the two directions

    def __str__(self) -> str:
        return (
            f"Loss from {self.loss.min():.4g} to {self.loss.max():.4g} within {self.steps[-1]:.3g} along directions "
            f"of curvature {self.curvatures[0]:.4g} and {self.curvatures[1]:.4g}"
        )

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A surface and its contours: a matplotlib Figure, saved if `path` is given."""
        from bantamweight.curvature.plots import plot_surface

        return plot_surface(self, path)


def loss_surface(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Any,
    eigenvalues: Eigenvalues,
    *,
    radius: float | None = None,
    points: int = 21,
    progress: Any = None,
) -> LossSurface:
    """The mean loss on a square grid spanned by the first two eigenvectors. The model itself is not changed.

    Args:
        model, loss_fn, data: as `Hessian` takes them.
        eigenvalues: at least two eigenpairs of `top_eigenvalues`.
        radius: half the side of the square; None: where the steeper parabola has risen by the loss itself (or 0.1).
        points: grid points a side.
    """
    if len(eigenvalues.values) < 2:
        raise BantamweightError("a surface needs two eigenvectors; call top_eigenvalues with k=2 or more")
    if points < 2:
        raise BantamweightError(f"points is {points}, but must be at least 2")
    steepest = float(np.abs(eigenvalues.values[:2]).max())
    if radius is None:
        rise = max(eigenvalues.conditions.loss, 0.1)
        radius = float(np.sqrt(2 * rise / steepest)) if steepest > 0 else 1.0
    steps = np.linspace(-radius, radius, points)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    first, second = eigenvalues.named_vector(0), eigenvalues.named_vector(1)
    batches = as_batches(data, next(iter(parameters.values())).device)
    samples = sum(batch.samples for batch in batches)
    loss = np.zeros((points, points))
    with (
        torch.no_grad(),
        evaluation(model, "eval"),
        tqdm(total=points**2, desc="loss surface", unit="point", leave=False, disable=progress) as bar,
    ):
        for i, a in enumerate(steps):
            for j, b in enumerate(steps):
                moved = {n: parameters[n] + float(a) * first[n] + float(b) * second[n] for n in eigenvalues.names}
                for batch in batches:
                    outputs = torch.func.functional_call(model, moved, batch.arguments, batch.keywords)
                    loss[i, j] += float(loss_fn(outputs, batch.targets)) * batch.samples / samples
                bar.update()
    values = (float(eigenvalues.values[0]), float(eigenvalues.values[1]))
    return LossSurface(steps=steps, loss=loss, curvatures=values)
