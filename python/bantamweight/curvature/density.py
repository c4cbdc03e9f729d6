"""The spectral density of a Hessian by stochastic Lanczos quadrature.

Ubaru, Chen, Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", 2017, doi:10.1137/16M1104974;
Ghorbani, Krishnan, Xiao, "An investigation into neural net optimization via Hessian eigenvalue density", 2019,
arXiv:1901.10159.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bantamweight.curvature.hvp import Hessian
from bantamweight.curvature.lanczos import SymmetricMatrix
from bantamweight.curvature.mean_loss import LossFunction
from bantamweight.curvature.result import Conditions, Result
from bantamweight.curvature.trace import rademacher
from bantamweight.curvature.vectors import Basis
from bantamweight.errors import BantamweightError


@dataclass(frozen=True, kw_only=True, eq=False)
class SpectralDensity(Result):
    """How the eigenvalues are spread: quadrature nodes with weights, and the curve they make under a Gaussian."""

    nodes: np.ndarray  # [probes * steps] Ritz values
    weights: np.ndarray  # [probes * steps], sum 1: the part of all eigenvalues near each node
    grid: np.ndarray  # [points] abscissas of the curve
    density: np.ndarray  # [points], integrates to 1
    width: float  # standard deviation of the Gaussian around each node
    probes: int
    steps: int
    products: int
    conditions: Conditions | None

    def fraction(self, low: float, high: float) -> float:
        """The estimated part of the eigenvalues from `low` to `high`."""
        return float(self.weights[(self.nodes >= low) & (self.nodes <= high)].sum())

    def __str__(self) -> str:
        low, high = float(self.nodes.min()), float(self.nodes.max())
        near = 0.01 * max(abs(low), abs(high))
        return (
            f"Spectral density of the Hessian: from {low:.4g} to {high:.4g}; {100 * self.fraction(-near, near):.1f}% "
            f"of the eigenvalues within 1% of zero, {100 * self.fraction(-np.inf, -near):.2f}% below "
            f"({self.probes} probes, {self.products} products)\n  {self.conditions}"
        )

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """The density on a logarithmic scale: a matplotlib Figure, saved if `path` is given."""
        from bantamweight.curvature.plots import plot_density

        return plot_density(self, path)


def spectral_density(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Any,
    *,
    probes: int = 4,
    steps: int = 30,
    width: float | None = None,
    points: int = 1000,
    blocks: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: Any = None,
    **options: Any,
) -> SpectralDensity:
    """The spectral density of the mean loss's Hessian, from probes * steps Hessian-vector products.

    Args:
        model, loss_fn, data, options: as `Hessian` takes them.
        probes: random starting vectors; more make the weights more exact.
        steps: Lanczos steps a probe; more make the nodes more exact.
        width: standard deviation of the Gaussian drawn around a node; None: 1% of the spectrum's length.
        blocks: restrict to a diagonal block.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> data = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))
        >>> round(spectral_density(model, nn.functional.mse_loss, data).fraction(3.5, 4.5), 3)
        0.5
    """
    hessian = Hessian(model, loss_fn, data, blocks=blocks, **options)
    result = density_of(hessian, probes=probes, steps=steps, width=width, points=points, seed=seed, progress=progress)
    return SpectralDensity(**{**vars(result), "conditions": hessian.conditions})


def density_of(
    matrix: SymmetricMatrix,
    *,
    probes: int = 4,
    steps: int = 30,
    width: float | None = None,
    points: int = 1000,
    seed: int = 0,
    progress: Any = None,
) -> SpectralDensity:
    """`spectral_density` of any symmetric matrix."""
    if probes < 1 or steps < 1 or points < 2:
        raise BantamweightError(
            f"probes ({probes}) and steps ({steps}) must be at least 1 and points ({points}) at least 2"
        )
    if width is not None and width <= 0:
        raise BantamweightError(f"width is {width}, but a standard deviation must be above 0")
    generator = torch.Generator().manual_seed(seed)
    nodes, weights, products = [], [], 0
    steps = min(steps, matrix.size)
    with tqdm(total=probes * steps, desc="spectral density", unit="product", leave=False, disable=progress) as bar:
        for _ in range(probes):
            theta, tau = _quadrature(matrix, rademacher(matrix, generator), steps, bar)
            nodes.append(theta)
            weights.append(tau / probes)
            products += len(theta)
    node, weight = np.concatenate(nodes), np.concatenate(weights)
    length = max(float(node.max() - node.min()), 1e-3 * float(np.abs(node).max()), 1e-12)
    sigma = 0.01 * length if width is None else width
    grid = np.linspace(node.min() - 5 * sigma, node.max() + 5 * sigma, points)
    bells = np.exp(-0.5 * ((grid[:, None] - node) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    return SpectralDensity(
        nodes=node,
        weights=weight,
        grid=grid,
        density=bells @ weight,
        width=sigma,
        probes=probes,
        steps=steps,
        products=products,
        conditions=None,
    )


def _quadrature(matrix: SymmetricMatrix, start: Tensor, steps: int, bar: Any) -> tuple[np.ndarray, np.ndarray]:
    """Gauss quadrature of the spectral measure of `start`: nodes, and weights that sum to 1."""
    basis = Basis(matrix.size, matrix.dtype, matrix.device)
    basis.append(basis.orthogonalise([start]).after)
    alphas, betas, scale = [], [], 0.0
    for j in range(steps):
        parts = matrix.product(basis.row(j))
        bar.update()
        known = np.zeros(j)  # the three-term recurrence: only the coefficient on the vector before is not zero
        if j:
            known[-1] = betas[-1]
        coefficients, length, beta, _ = basis.orthogonalise(parts, float(1.0 / basis.norms[j]), known)
        alphas.append(coefficients[j])
        scale = max(scale, length)
        if j + 1 == steps or beta <= 20 * torch.finfo(matrix.dtype).eps * scale:
            break
        betas.append(beta)
        basis.append(beta)
    T = np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1)
    theta, S = np.linalg.eigh(T)
    return theta, S[0] ** 2
