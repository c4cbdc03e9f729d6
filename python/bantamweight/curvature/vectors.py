"""The long vectors of Lanczos and power iteration: a growing orthogonal basis in flat storage.

Orthogonalising a vector reads the basis twice: once to project it, once to subtract the projections. The second
reading also measures what is left of them, so that another is made only when rounding made it necessary. A Lanczos
step knows nearly all of its coefficients beforehand and needs only the second reading. Float32 on the CPU runs in the
fused kernels of csrc/vector_ops; other types and devices run in torch, with the same results.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bantamweight import _C
from bantamweight.errors import BantamweightError, KernelError

ROWS_PER_SLAB = 16


def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    """<x, y> over two lists of tensors of the same shapes."""
    if native(*x, *y):
        status, result = _C.vector_dot(addresses(x), addresses(y), sizes(x, y), "")
        check(status)
        return result
    return float(sum(torch.dot(a.reshape(-1), b.reshape(-1)).double() for a, b in zip(x, y, strict=True)))


def norm(x: Sequence[Tensor]) -> float:
    """The Euclidean norm of a list of tensors taken as one vector."""
    return float(np.sqrt(dot(x, x)))


def axpy(a: float, x: Sequence[Tensor], y: Sequence[Tensor]) -> None:
    """y += a x over two lists of tensors of the same shapes."""
    if native(*x, *y):
        check(_C.vector_axpy(a, addresses(x), addresses(y), sizes(x, y), ""))
        return
    for source, target in zip(x, y, strict=True):
        target.add_(source, alpha=a)


def scale(a: float, x: Sequence[Tensor]) -> None:
    """x *= a over a list of tensors."""
    if native(*x):
        check(_C.vector_scale(a, addresses(x), sizes(x, x), ""))
        return
    for tensor in x:
        tensor.mul_(a)


def native(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors as they lie in memory."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def sizes(x: Sequence[Tensor], y: Sequence[Tensor]) -> list[int]:
    counts = [tensor.numel() for tensor in x]
    if counts != [tensor.numel() for tensor in y]:
        raise BantamweightError("the two lists of tensors differ in their sizes; pass lists of the same shapes")
    return counts


def check(status: int) -> None:
    if status:
        raise KernelError(f"vector_ops: {_C.status_message(status)}")


class Basis:
    """Orthogonal vectors u_i of [size] with their norms; the orthonormal basis is v_i = u_i / norms[i].

    Leaving the u_i unscaled saves a pass over memory a step: the factors 1 / norms[i] go into the small coefficients.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self._native = dtype == torch.float32 and device.type == "cpu"
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

    def project(self, parts: Sequence[Tensor], scale: float = 1.0, first: int = 0) -> tuple[Tensor, np.ndarray, float]:
        """Copies `scale * parts` into the next free row w. Returns w, <v_i, w> for i >= first, and ||w||."""
        if len(self) == len(self._slabs) * ROWS_PER_SLAB:
            self._slabs.append(torch.empty(ROWS_PER_SLAB, self.size, dtype=self.dtype, device=self.device))
        w = self.row(len(self))
        if self._native and native(*parts):
            counts = [part.numel() for part in parts]
            rows = self._rows()[first:]
            status, dots, norm2 = _C.vector_project(addresses(parts), counts, scale, rows, w.data_ptr(), self.size, "")
            check(status)
            return w, np.asarray(dots) / self.norms[first:], float(np.sqrt(norm2))
        torch.cat([part.reshape(-1) for part in parts], out=w)
        if scale != 1.0:
            w.mul_(scale)
        return w, self._coefficients(w, first), float(torch.linalg.vector_norm(w, dtype=torch.float64))

    def subtract(self, w: Tensor, coefficients: np.ndarray) -> tuple[np.ndarray, float]:
        """w -= sum_i coefficients[i] v_i. Returns all the new <v_i, w> (rounding errors) and the new ||w||."""
        if not len(self):
            return np.zeros(0), float(torch.linalg.vector_norm(w, dtype=torch.float64))
        factors = coefficients / self.norms
        if self._native:
            rows, some = self._rows(), np.flatnonzero(factors)
            status, dots, norm2 = _C.vector_subtract(
                [rows[i] for i in some], factors[some], rows, w.data_ptr(), self.size, ""
            )
            check(status)
            return np.asarray(dots) / self.norms, float(np.sqrt(norm2))
        for slab, c in self._filled(factors):
            w.addmv_(slab.T, c, alpha=-1.0)
        return self._coefficients(w), float(torch.linalg.vector_norm(w, dtype=torch.float64))

    def append(self, norm: float) -> None:
        """Keeps the free row that `project` filled as the next basis vector."""
        self._norms.append(norm)

    def orthogonalise(
        self, parts: Sequence[Tensor], scale: float = 1.0, known: np.ndarray | None = None
    ) -> tuple[np.ndarray, float, float]:
        """Projects `scale * parts` out of the basis into the free row, to nearly working precision.

        `known` are the first coefficients, as far as they follow from earlier steps; only the others are measured
        before the subtraction. Returns the coefficients removed, the norm before and the norm after.
        """
        known = np.zeros(0) if known is None else known
        w, rest, before = self.project(parts, scale, first=len(known))
        coefficients = np.concatenate([known, rest])
        left, after = self.subtract(w, coefficients)
        passes = 1
        while passes < 3 and len(left) and np.abs(left).max() > 64 * torch.finfo(self.dtype).eps * after:
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

    def _rows(self) -> list[int]:
        return [self.row(i).data_ptr() for i in range(len(self))]

    def _coefficients(self, w: Tensor, first: int = 0) -> np.ndarray:
        if first >= len(self):
            return np.zeros(0)
        if first:
            products = torch.stack([torch.dot(self.row(i), w) for i in range(first, len(self))])
        else:
            products = torch.cat([slab @ w for slab, _ in self._filled(np.zeros(len(self)))])
        return products.double().cpu().numpy() / self.norms[first:]

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
