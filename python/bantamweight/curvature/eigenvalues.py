"""The largest (and smallest) eigenvalues of a model's Hessian, with the vectors and the proof of convergence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bantamweight.curvature.hvp import Hessian
from bantamweight.curvature.lanczos import lanczos
from bantamweight.curvature.mean_loss import LossFunction
from bantamweight.curvature.power import power_iteration
from bantamweight.curvature.result import Conditions, Result
from bantamweight.curvature.vectors import random_start
from bantamweight.errors import BantamweightError


@dataclass(frozen=True, kw_only=True, eq=False)
class Eigenvalues(Result):
    """Eigenpairs of a Hessian (or of a block of it)."""

    values: np.ndarray  # [k], in the order asked for
    residuals: np.ndarray  # [k], ||H v - value v|| with ||v|| = 1
    products: int  # Hessian-vector products used
    converged: bool
    which: str
    method: str
    conditions: Conditions
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    vectors: Tensor = field(repr=False)  # [k, n], unit rows, flat over the parameters in `names`

    _not_in_json = ("vectors",)

    def named_vector(self, i: int) -> dict[str, Tensor]:
        """Eigenvector i in the parameters' shapes."""
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        parts = self.vectors[i].split(sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def __str__(self) -> str:
        rows = [f"  {value: .6g}   residual {r:.2g}" for value, r in zip(self.values, self.residuals, strict=True)]
        state = "converged" if self.converged else "NOT converged: raise max_products or tol"
        head = f"Eigenvalues of the Hessian ({self.which}, {self.method}, {self.products} products, {state})"
        return "\n".join([head, *rows, f"  {self.conditions}"])

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A stem a value, its residual as the error bar: a matplotlib Figure, saved if `path` is given."""
        from bantamweight.curvature.plots import plot_eigenvalues

        return plot_eigenvalues(self, path)


def top_eigenvalues(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Any,
    *,
    k: int = 1,
    which: str = "largest_magnitude",
    blocks: str | Sequence[str] | None = None,
    tol: float = 1e-3,
    method: str = "lanczos",
    max_products: int | None = None,
    start: Eigenvalues | Tensor | None = None,
    block_size: int = 1,
    seed: int = 0,
    progress: Any = None,
    **options: Any,
) -> Eigenvalues:
    """The k eigenvalues of the mean loss's Hessian that lie furthest out.

    Args:
        model, loss_fn, data: as `Hessian` takes them.
        k: how many; which="both_ends" gives k from each end.
        which: "largest_magnitude", "largest", "smallest" or "both_ends". When the two ends are equally far out, the
            largest magnitude is unstable from run to run; ask for both ends then.
        blocks: restrict to a diagonal block (names of parameters or modules).
        tol: relative error of an eigenvalue.
        method: "lanczos", or "power" for power iteration with deflation as Q-BERT and PyHessian publish it (only
            which="largest_magnitude"; tol is then the relative change of a value between two steps).
        max_products: Hessian-vector products before giving up; the result then says that it did not converge.
            Default 100 (power: 100 an eigenvalue).
        start: the eigenvectors of a similar Hessian (another subset of the data), to start from; None for a random
            vector plus the gradient's direction.
        block_size: Lanczos vectors in the starting block; raise it to find multiple eigenvalues.
        progress: tqdm's `disable`; None shows a bar on a terminal only.
        options: `Hessian`'s mode, differentiation, graph_memory and process_group.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> data = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))
        >>> [round(float(v), 4) for v in top_eigenvalues(model, nn.functional.mse_loss, data, k=2).values]
        [4.0, 1.0]
    """
    hessian = Hessian(model, loss_fn, data, blocks=blocks, **options)
    return eigenvalues_of(
        hessian,
        k=k,
        which=which,
        tol=tol,
        method=method,
        max_products=max_products,
        start=start,
        block_size=block_size,
        seed=seed,
        progress=progress,
    )


def eigenvalues_of(
    hessian: Hessian,
    *,
    k: int = 1,
    which: str = "largest_magnitude",
    tol: float = 1e-3,
    method: str = "lanczos",
    max_products: int | None = None,
    start: Eigenvalues | Tensor | None = None,
    block_size: int = 1,
    seed: int = 0,
    progress: Any = None,
) -> Eigenvalues:
    """`top_eigenvalues` of a Hessian that exists already, for instance one block of many on the same graph."""
    vectors = start.vectors if isinstance(start, Eigenvalues) else start
    if method == "lanczos":
        pairs = lanczos(
            hessian,
            k=k,
            which=which,
            tol=tol,
            max_products=100 if max_products is None else max_products,
            start=_start(hessian, block_size, seed) if vectors is None else vectors,
            block_size=block_size,
            seed=seed,
            progress=progress,
        )
    elif method == "power":
        if which != "largest_magnitude":
            raise BantamweightError(f"power iteration finds the largest magnitude, not {which!r}; use method='lanczos'")
        steps = 100 if max_products is None else max(1, max_products // k)
        pairs = power_iteration(hessian, k=k, tol=tol, max_steps=steps, start=vectors, seed=seed, progress=progress)
    else:
        raise BantamweightError(f"method is {method!r}, but must be 'lanczos' or 'power'")
    return Eigenvalues(
        values=pairs.values,
        residuals=pairs.residuals,
        products=pairs.products,
        converged=pairs.converged,
        which=which,
        method=method,
        conditions=hessian.conditions,
        names=tuple(hessian.names),
        shapes=tuple(tuple(part.shape) for part in hessian.split(pairs.vectors[0])),
        vectors=pairs.vectors,
    )


def _start(hessian: Hessian, block_size: int, seed: int) -> Tensor:
    """Random unit vectors, the first with the gradient's direction added.

    Gradients lie mostly among the top eigenvectors (Gur-Ari, Roberts, Dyer, 2018, arXiv:1812.04754) and this one
    costs nothing more on a kept graph; the random part keeps every direction in play.
    """
    start = random_start(max(1, block_size), hessian.size, hessian.dtype, hessian.device, seed)
    start /= torch.linalg.vector_norm(start, dim=1, keepdim=True)
    gradient = hessian.gradient()
    length = torch.linalg.vector_norm(gradient)
    if bool(length > 0):
        start[0] += gradient / length
    return start
