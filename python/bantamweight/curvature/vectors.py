"""The long vectors of Lanczos and power iteration: a growing orthogonal basis in flat storage.

A step reads the basis twice: once to project the new vector on it, once to subtract the projections. The second
reading also measures what is left of them, so that a third is made only when rounding made it necessary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ROWS_PER_SLAB = 16


class Basis:
    """Orthogonal vectors u_i of [size] with their norms; the orthonormal basis is v_i = u_i / norms[i].

    Leaving the u_i unscaled saves a pass over memory a step: the factors 1 / norms[i] go into the small coefficients.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self._slabs: list[Tensor] = []
        self._norms: list[float] = []

    def __len__(self) -> int:
        return len(self._norms)

    @property
    def norms(self) -> np.ndarray:
        return np.asarray(self._norms)

    def row(self, i: int) -> Tensor:
        """u_i, flat [size]; scale it by 1 / norms[i] for the unit vector."""
        return self._slabs[i // ROWS_PER_SLAB][i % ROWS_PER_SLAB]

    def project(self, parts: Sequence[Tensor], scale: float = 1.0) -> tuple[Tensor, np.ndarray, float]:
        """Copies `scale * parts` into the next free row w. Returns w, the coefficients <v_i, w>, and ||w||."""
        if len(self) == len(self._slabs) * ROWS_PER_SLAB:
            self._slabs.append(torch.empty(ROWS_PER_SLAB, self.size, dtype=self.dtype, device=self.device))
        w = self.row(len(self))
        torch.cat([part.reshape(-1) for part in parts], out=w)
        if scale != 1.0:
            w.mul_(scale)
        return w, self._coefficients(w), float(torch.linalg.vector_norm(w, dtype=torch.float64))

    def subtract(self, w: Tensor, coefficients: np.ndarray) -> tuple[np.ndarray, float]:
        """w -= sum_i coefficients[i] v_i. Returns the new <v_i, w> (rounding errors) and the new ||w||."""
        for slab, c in self._filled(coefficients / self.norms):
            w.addmv_(slab.T, c, alpha=-1.0)
        return self._coefficients(w), float(torch.linalg.vector_norm(w, dtype=torch.float64))

    def append(self, norm: float) -> None:
        """Keeps the free row that `project` filled as the next basis vector."""
        self._norms.append(norm)

    def orthogonalise(self, parts: Sequence[Tensor], scale: float = 1.0) -> tuple[np.ndarray, float, float]:
        """Projects `scale * parts` out of the basis into the free row, to working precision.

        Returns the coefficients on the basis, the norm before and the norm after.
        """
        w, coefficients, before = self.project(parts, scale)
        left, after = self.subtract(w, coefficients)
        passes = 1
        while passes < 3 and len(left) and np.abs(left).max() > 8 * torch.finfo(self.dtype).eps * after:
            coefficients = coefficients + left
            left, after = self.subtract(w, left)
            passes += 1
        return coefficients, before, after

    def combine(self, weights: np.ndarray) -> Tensor:
        """sum_i weights[i, j] v_i as rows: [columns of weights, size]."""
        rows = torch.zeros(weights.shape[1], self.size, dtype=self.dtype, device=self.device)
        for slab, c in self._filled(weights / self.norms[:, None]):
            rows.addmm_(c.T, slab)
        return rows

    def restart(self, rows: Tensor, pending: Sequence[int]) -> None:
        """Replaces the basis by the orthonormal `rows` followed by the old vectors numbered in `pending`."""
        old = [(self.row(i).clone(), self._norms[i]) for i in pending]
        self._norms = []
        for vector, norm in [(row, 1.0) for row in rows] + old:
            self.row(len(self)).copy_(vector)
            self.append(norm)
        del self._slabs[len(self) // ROWS_PER_SLAB + 1 :]

    def _coefficients(self, w: Tensor) -> np.ndarray:
        if not len(self):
            return np.zeros(0)
        products = torch.cat([slab @ w for slab, _ in self._filled(np.zeros(len(self)))])
        return products.double().cpu().numpy() / self.norms

    def _filled(self, weights: np.ndarray):
        """The filled rows slab by slab, each with its part of `weights` on the device."""
        for start in range(0, len(self), ROWS_PER_SLAB):
            stop = min(start + ROWS_PER_SLAB, len(self))
            part = torch.from_numpy(weights[start:stop]).to(self.device, self.dtype)
            yield self._slabs[start // ROWS_PER_SLAB][: stop - start], part


def random_start(count: int, size: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """[count, size] standard normal; drawn on the CPU, so that every device and process starts from the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=dtype).to(device)
