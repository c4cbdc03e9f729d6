"""The long vectors of Lanczos and power iteration: a growing orthogonal basis in flat storage.

Orthogonalising a vector reads the basis twice: once to measure its projections, once to remove them. The second
reading also measures what is left of them, so that another is made only when rounding made it necessary. A Lanczos
step knows nearly all of its coefficients beforehand and needs only the second reading. The vector itself is read where
the Hessian-vector product left it, as a list of tensors, and written once. Float32 on the CPU runs in the
fused kernels of csrc/vector_ops; other types and devices run in torch, with the same results.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from bantamweight import _C
from bantamweight.errors import BantamweightError, KernelError

ROWS_PER_SLAB = 16
HUGE_PAGE = 2 << 20
CACHE_LINE = 64


class Parts(NamedTuple):
    """A list of tensors as the kernels take it: where each lies, and how long it is."""

    tensors: Sequence[Tensor]  # kept alive
    addresses: list[int]
    sizes: list[int]


def listed(tensors: Sequence[Tensor]) -> Parts | None:
    """The tensors as they lie in memory; None if they are not contiguous float32 on the CPU."""
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
            return None
    return Parts(tensors, [t.data_ptr() for t in tensors], [t.numel() for t in tensors])


def listed_alike(x: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[Parts, Parts] | None:
    if [t.numel() for t in x] != [t.numel() for t in y]:
        raise BantamweightError("the two lists of tensors differ in their sizes; pass lists of the same shapes")
    a, b = listed(x), listed(y)
    return None if a is None or b is None else (a, b)


def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    """<x, y> over two lists of tensors of the same shapes."""
    if native := listed_alike(x, y):
        status, result = _C.vector_dot(native[0].addresses, native[1].addresses, native[0].sizes, "")
        check(status)
        return result
    return float(sum(torch.dot(a.reshape(-1), b.reshape(-1)).double() for a, b in zip(x, y, strict=True)))


def norm(x: Sequence[Tensor]) -> float:
    """The Euclidean norm of a list of tensors taken as one vector."""
    return float(np.sqrt(dot(x, x)))


def axpy(a: float, x: Sequence[Tensor], y: Sequence[Tensor]) -> None:
    """y += a x over two lists of tensors of the same shapes."""
    if native := listed_alike(x, y):
        check(_C.vector_axpy(a, native[0].addresses, native[1].addresses, native[0].sizes, ""))
        return
    for source, target in zip(x, y, strict=True):
        target.add_(source, alpha=a)


def scale(a: float, x: Sequence[Tensor]) -> None:
    """x *= a over a list of tensors."""
    if native := listed(x):
        check(_C.vector_scale(a, native.addresses, native.sizes, ""))
        return
    for tensor in x:
        tensor.mul_(a)


def check(status: int) -> None:
    if status:
        raise KernelError(f"vector_ops: {_C.status_message(status)}")


class Remainder(NamedTuple):
    """What is known of a vector once its projections on a basis are removed."""

    coefficients: np.ndarray  # removed, of the orthonormal v_i
    before: float  # its norm with them
    after: float  # its norm without
    inner: float  # its inner product with the vector asked for


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

    def free_row(self) -> Tensor:
        """The row after the last vector; `append` makes it one."""
        if len(self) == len(self._slabs) * ROWS_PER_SLAB:
            self._slabs.append(new_rows(ROWS_PER_SLAB, self.size, self.dtype, self.device))
        return self.row(len(self))

    def append(self, norm: float) -> None:
        """Keeps what the free row holds as the next vector."""
        self._norms.append(norm)

    def orthogonalise(
        self,
        parts: Sequence[Tensor],
        scale: float = 1.0,
        known: np.ndarray | None = None,
        along: Tensor | None = None,
        into: Tensor | None = None,
    ) -> Remainder:
        """Writes `scale * parts` without its projections on the basis to the free row, to nearly working precision.

        Args:
            known: the first coefficients, as far as they follow from earlier steps; only the others are measured
                before the subtraction.
            along: a vector whose inner product with the remainder is wanted, too.
            into: where to write instead of the free row.
        """
        coefficients = np.zeros(0) if known is None else known
        read, w = self._taken(parts), self.free_row() if into is None else into
        if len(coefficients) < len(self):
            coefficients = np.concatenate([coefficients, scale * self._measure(read, first=len(coefficients))])
        left, inner, after = self._remove(read, scale, coefficients, w, along)
        passes = 1
        while passes < 3 and len(left) and np.abs(left).max() > 64 * torch.finfo(self.dtype).eps * after:
            coefficients = coefficients + left
            left, inner, after = self._remove(self._taken([w]), 1.0, left, w, along)
            passes += 1
        before = float(np.sqrt(after**2 + (coefficients**2).sum()))  # Pythagoras
        return Remainder(coefficients, before, after, inner)

    def _measure(self, parts: Parts, first: int) -> np.ndarray:
        """<v_i, x> for i >= first, where x is the parts end to end."""
        if self._native:
            status, dots = _C.vector_measure(parts.addresses, parts.sizes, self._rows()[first:], self.size, "")
            check(status)
        else:
            dots = self._products(flat(parts.tensors), first)
        return np.asarray(dots) / self.norms[first:]

    def _remove(
        self, parts: Parts, scale: float, coefficients: np.ndarray, w: Tensor, along: Tensor | None
    ) -> tuple[np.ndarray, float, float]:
        """w = scale * parts - sum_i coefficients[i] v_i; returns all <v_i, w> (rounding errors), <along, w>, ||w||."""
        factors = coefficients / self.norms
        if self._native:
            rows, some = self._rows(), np.flatnonzero(factors)
            measured = rows if along is None else [*rows, along.data_ptr()]
            status, dots, norm2 = _C.vector_remove(
                parts.addresses, parts.sizes, scale, [rows[i] for i in some], factors[some], measured,
                w.data_ptr(), self.size, "",
            )  # fmt: skip
            check(status)
            inner = 0.0 if along is None else dots.pop()
            return np.asarray(dots) / self.norms, inner, float(np.sqrt(norm2))
        torch.mul(flat(parts.tensors), scale, out=w)
        for slab, c in self._filled(factors):
            w.addmv_(slab.T, c, alpha=-1.0)
        left, norm = np.asarray(self._products(w)) / self.norms, torch.linalg.vector_norm(w, dtype=torch.float64)
        return left, 0.0 if along is None else float(torch.dot(along, w)), float(norm)

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
            self.free_row().copy_(vector)
            self.append(norm)
        del self._slabs[len(self) // ROWS_PER_SLAB + 1 :]

    def _taken(self, parts: Sequence[Tensor]) -> Parts:
        """Looked at once a step, however many passes are made."""
        if not self._native:
            return Parts(parts, [], [])
        return listed(parts) or cast(Parts, listed([flat(parts).float().contiguous()]))

    def _rows(self) -> list[int]:
        return [self.row(i).data_ptr() for i in range(len(self))]

    def _products(self, x: Tensor, first: int = 0) -> list[float]:
        """<u_i, x> for i >= first."""
        if first >= len(self):
            return []
        if first:
            products = torch.stack([torch.dot(self.row(i), x) for i in range(first, len(self))])
        else:
            products = torch.cat([slab @ x for slab, _ in self._filled(np.zeros(len(self)))])
        return products.double().tolist()

    def _filled(self, weights: np.ndarray):
        """The filled rows slab by slab, each with its part of `weights` on the device."""
        for start in range(0, len(self), ROWS_PER_SLAB):
            stop = min(start + ROWS_PER_SLAB, len(self))
            part = torch.from_numpy(weights[start:stop]).to(self.device, self.dtype)
            yield self._slabs[start // ROWS_PER_SLAB][: stop - start], part


def new_rows(count: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count, size] of uninitialised memory, on the CPU in huge pages where there are any.

    A basis is read from end to end in every step: in pages of 4 KiB the look-up of addresses costs more than the sums.
    """
    itemsize = torch.empty(0, dtype=dtype).element_size()
    if device.type != "cpu" or count * size * itemsize < 2 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, size, dtype=dtype, device=device)
    stride = -(-size * itemsize // CACHE_LINE) * CACHE_LINE // itemsize
    memory = mmap.mmap(-1, count * stride * itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(count, stride)[:, :size]


def flat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].reshape(-1) if len(parts) == 1 else torch.cat([part.reshape(-1) for part in parts])


def random_start(count: int, size: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """[count, size] standard normal; drawn on the CPU, so that every device and process starts from the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=dtype).to(device)
