"""Hessian power iteration as Q-BERT uses it (Shen et al., 2020, arXiv:1909.05840) and PyHessian publishes it.

Yao et al., "PyHessian: Neural Networks Through the Lens of the Hessian", 2020, arXiv:1912.07145.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from bantamweight.curvature.lanczos import RitzPairs, SymmetricMatrix
from bantamweight.curvature.vectors import Basis, random_start
from bantamweight.errors import BantamweightError


def power_iteration(
    matrix: SymmetricMatrix,
    *,
    k: int = 1,
    tol: float = 1e-3,
    max_steps: int = 100,
    start: Tensor | None = None,
    seed: int = 0,
    progress: Any = None,
) -> RitzPairs:
    """The k eigenvalues largest in magnitude: v <- H v / ||H v||, orthogonal to the vectors found before.

    Stops an eigenvalue when it changes by less than `tol` of itself from one step to the next, as published: that is
    a rule about change and no bound on the error (where PyHessian returns the value before the last, this returns the
    last). The residuals tell how good the pairs are.
    """
    if not 1 <= k <= matrix.size:
        raise BantamweightError(f"k is {k}, but must be from 1 to the {matrix.size} parameters")
    if max_steps < 1:
        raise BantamweightError(f"max_steps is {max_steps}, but must be at least 1")
    found = Basis(matrix.size, matrix.dtype, matrix.device)
    seeds = random_start(k, matrix.size, matrix.dtype, matrix.device, seed)
    if start is not None:
        rows = start.reshape(-1, matrix.size)[:k].to(seeds)
        seeds[: len(rows)] = rows
    values, residuals = [], []
    products, converged = 0, True
    with tqdm(total=k * max_steps, desc="power iteration", unit="product", leave=False, disable=progress) as bar:
        for j in range(k):
            norm = found.orthogonalise([seeds[j]]).after
            v, spare = found.free_row(), seeds[j]
            value = None
            for _ in range(max_steps):
                parts = matrix.product(v)
                products += 1
                bar.update()
                step = found.orthogonalise(parts, scale=1.0 / norm, along=v, into=spare)
                previous, value = value, step.inner / norm
                residual = float(np.sqrt(max(step.before**2 - value**2, 0.0)))
                if step.after == 0.0:  # H v lies among the vectors found before: v itself is the eigenvector
                    break
                v, spare, norm = spare, v, step.after
                if previous is not None and abs(value - previous) < tol * (abs(previous) + 1e-6):
                    break
            else:
                converged = False
            if v.data_ptr() != found.free_row().data_ptr():
                found.free_row().copy_(v)
            found.append(norm)
            values.append(value)
            residuals.append(residual)
    return RitzPairs(
        values=np.asarray(values),
        vectors=found.combine(np.eye(k)),
        residuals=np.asarray(residuals),
        products=products,
        converged=converged,
    )
