"""Extreme eigenvalues of a Hessian by band Lanczos with full reorthogonalisation and thick restarts.

Lanczos (1950, doi:10.6028/jres.045.026); band form of Ruhe (1979, doi:10.1090/S0025-5718-1979-0521282-9); thick
restart of Wu and Simon (2000, doi:10.1137/S0895479898334605). A run ends when the residual of every wanted Ritz pair
is small, not when a value stops changing: changes stall long before the smaller eigenvalues appear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bantamweight.curvature.vectors import Basis, random_start
from bantamweight.errors import BantamweightError

WHICH = ("largest_magnitude", "largest", "smallest", "both_ends")
BASIS_BYTES = 4 << 30


class SymmetricMatrix(Protocol):
    """What Lanczos needs to know of a matrix; `Hessian` and `DenseMatrix` are two."""

    size: int
    dtype: torch.dtype
    device: torch.device

    def product(self, vector: Tensor) -> list[Tensor]: ...


class DenseMatrix:
    """A symmetric [n, n] tensor as an operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.size, self.dtype, self.device = len(matrix), matrix.dtype, matrix.device

    def product(self, vector: Tensor) -> list[Tensor]:
        return [self.matrix @ vector]


@dataclass(frozen=True, kw_only=True, eq=False)
class RitzPairs:
    values: np.ndarray  # [k] in the order of `wanted`
    vectors: Tensor  # [k, n] orthonormal rows
    residuals: np.ndarray  # [k] ||H v - value v||
    products: int
    converged: bool


def lanczos(
    matrix: SymmetricMatrix,
    *,
    k: int = 1,
    which: str = "largest_magnitude",
    tol: float = 1e-3,
    max_products: int = 100,
    start: Tensor | None = None,
    block_size: int = 1,
    max_basis: int | None = None,
    seed: int = 0,
    progress: Any = None,
) -> RitzPairs:
    """The k wanted eigenpairs of `matrix` (2k for which="both_ends").

    Args:
        which: "largest_magnitude", "largest" or "smallest" (algebraic), or "both_ends": k from each end.
        tol: relative error of an eigenvalue (of 1% of the largest, for one near zero). A pair has converged when
            its squared residual over the gap to the next Ritz value is below that, and its residual at most sqrt(tol)
            of the eigenvalue: the gap is known only as well as the Ritz values are.
        start: [m, n] or [n], for instance the vectors of a similar matrix; otherwise random.
        block_size: vectors in the starting block; above 1 it finds eigenvalues of that multiplicity.
        max_basis: basis vectors held in memory before a restart keeps the best Ritz vectors (default: 4 GiB's worth).
    """
    if which not in WHICH:
        raise BantamweightError(f"which is {which!r}, but must be one of {', '.join(WHICH)}")
    wanted = k * (2 if which == "both_ends" else 1)
    if not 1 <= wanted <= matrix.size:
        raise BantamweightError(f"k asks for {wanted} eigenvalues, but this matrix has between 1 and {matrix.size}")
    if not 0 < tol < 1:
        raise BantamweightError(f"tol is {tol}, but must lie between 0 and 1")
    if not 1 <= block_size <= matrix.size:
        raise BantamweightError(f"block_size is {block_size}, but must be from 1 to the {matrix.size} parameters")
    row_bytes = max(1, matrix.size * torch.empty(0, dtype=matrix.dtype).element_size())
    if max_basis is None:
        max_basis = BASIS_BYTES // row_bytes
    max_basis = max(max_basis, 2 * wanted + 2 * block_size + 2)

    basis = Basis(matrix.size, matrix.dtype, matrix.device)
    for vector in _start_block(matrix, start, block_size, seed):
        _, before, after, _ = basis.orthogonalise([vector])
        if after > 100 * torch.finfo(matrix.dtype).eps * before:
            basis.append(after)

    # T[:, j] holds the coefficients of H v_j on the basis. The first p columns are done; the vectors from p on are
    # pending, and their rows of T are the residuals' coefficients.
    T = np.zeros((max(1, len(basis)), max(1, len(basis))))
    p = products = 0
    values = residuals = np.zeros(0)
    S = np.zeros((0, 0))
    chosen = np.zeros(0, dtype=int)
    scale = 0.0
    settled: np.ndarray | None = None
    converged = False
    bar = tqdm(total=max_products, desc="Lanczos", unit="product", leave=False, disable=progress)
    with bar:
        while products < max_products and not converged:
            if p == len(basis) and not _append_random(basis, seed + 1 + products):
                break
            if len(basis) >= max_basis:
                keep = _order(values, k, which, extra=max_basis // 4)
                T, p = _restart(basis, T[p : len(basis), :p], values[keep], S[:, keep], p)
            parts = matrix.product(basis.row(p))
            products += 1
            bar.update()
            # T is symmetric: the coefficients on vectors that are done stand in its row p already, nearly all zero.
            known = np.where(np.abs(T[p, :p]) > torch.finfo(matrix.dtype).eps * scale, T[p, :p], 0.0)
            coefficients, length, beta, _ = basis.orthogonalise(parts, float(1.0 / basis.norms[p]), known)
            m = len(basis)
            T = _grown(T, m + 1)
            T[:m, p] = coefficients
            scale = max(scale, length)
            if beta > 20 * torch.finfo(matrix.dtype).eps * scale:
                T[m, p] = beta
                basis.append(beta)
            p += 1
            values, S = np.linalg.eigh((T[:p, :p] + T[:p, :p].T) / 2)
            residuals = np.linalg.norm(T[p : len(basis), :p] @ S, axis=0)
            chosen = _order(values, k, which)
            if len(chosen) == wanted:
                magnitude = np.maximum(np.abs(values[chosen]), 0.01 * np.abs(values).max())
                small = residuals[chosen] <= np.sqrt(tol) * magnitude
                exact = _errors(values, residuals)[chosen] <= tol * magnitude
                # One product more than wanted pairs, or a pair that the start happens to lack could be missed.
                enough = p > wanted or p == matrix.size
                converged = bool(enough and small.all() and exact.all())
                if p == len(basis) < matrix.size:
                    # The Krylov space is invariant, so its residuals vanish and prove nothing about the rest: go on
                    # from random directions until one of them no longer changes the wanted values.
                    converged = settled is not None and np.allclose(settled, values[chosen], rtol=tol)
                    settled = values[chosen]
    if not len(chosen):
        raise BantamweightError(f"max_products is {max_products}, but at least 1 is needed")
    vectors = basis.combine(np.vstack([S[:, chosen], np.zeros((len(basis) - p, len(chosen)))]))
    return RitzPairs(
        values=values[chosen],
        vectors=vectors,
        residuals=residuals[chosen],
        products=products,
        converged=converged or p >= matrix.size,
    )


def _start_block(matrix: SymmetricMatrix, start: Tensor | None, block_size: int, seed: int) -> Tensor:
    if start is None:
        return random_start(block_size, matrix.size, matrix.dtype, matrix.device, seed)
    start = start.reshape(-1, start.shape[-1]).to(matrix.device, matrix.dtype)
    if start.shape[1] != matrix.size:
        raise BantamweightError(f"start has vectors of {start.shape[1]} numbers, but the matrix has {matrix.size}")
    if not bool(torch.isfinite(start).all()) or not bool(start.any()):
        raise BantamweightError("start must be finite and not zero; pass None for a random start")
    if block_size == 1:
        return start.sum(0, keepdim=True)  # one vector with a share of every eigenvector that is known already
    if len(start) >= block_size:
        return start[:block_size]
    rest = random_start(block_size - len(start), matrix.size, matrix.dtype, matrix.device, seed)
    return torch.cat([start, rest])


def _append_random(basis: Basis, seed: int) -> bool:
    """Goes on from a random direction when the Krylov space is exhausted; False if there is none left."""
    if len(basis) == basis.size:
        return False
    vector = random_start(1, basis.size, basis.dtype, basis.device, seed)[0]
    _, before, after, _ = basis.orthogonalise([vector])
    if after <= 100 * torch.finfo(basis.dtype).eps * before:
        return False
    basis.append(after)
    return True


def _order(values: np.ndarray, k: int, which: str, extra: int = 0) -> np.ndarray:
    """Indices of the wanted among `values` (ascending), `extra` more of them on request."""
    count = k + extra
    if which == "largest_magnitude":
        return np.argsort(-np.abs(values), kind="stable")[:count]
    if which == "largest":
        return np.arange(len(values))[::-1][:count]
    if which == "smallest":
        return np.arange(len(values))[:count]
    count = min(k + extra // 2, len(values))
    top, bottom = np.arange(len(values))[::-1][:count], np.arange(len(values))[:count][::-1]
    return np.concatenate([top, [i for i in bottom if i not in top]]).astype(int)


def _errors(values: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """Bounds on the eigenvalues' errors: the residual, or its square over the gap to the nearest other Ritz value."""
    steps = np.diff(values)
    gaps = np.minimum(np.append(steps, np.inf), np.append(np.inf, steps))
    return residuals * np.minimum(1.0, residuals / np.maximum(gaps, 1e-300))


def _grown(T: np.ndarray, size: int) -> np.ndarray:
    if len(T) >= size:
        return T
    larger = np.zeros((2 * size, 2 * size))
    larger[: len(T), : len(T)] = T
    return larger


def _restart(basis: Basis, coupling: np.ndarray, values: np.ndarray, S: np.ndarray, p: int) -> tuple[np.ndarray, int]:
    """Shrinks the basis to the Ritz pairs (values, S) and the pending vectors; returns H projected on them."""
    pending = range(p, len(basis))
    q, r = len(values), len(pending)
    basis.restart(basis.combine(np.vstack([S, np.zeros((r, q))])), pending)
    projected = np.zeros((q + r, q + r))
    projected[:q, :q] = np.diag(values)
    projected[q:, :q] = coupling @ S
    return projected, q
