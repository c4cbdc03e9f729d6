"""The trace of a Hessian with its standard error, from random probes.

Hutchinson (1990, doi:10.1080/03610919008812866) and Hutch++ (Meyer, Musco, Musco, Woodruff, 2021, arXiv:2010.09649).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bantamweight.curvature import vectors
from bantamweight.curvature.hvp import Hessian
from bantamweight.curvature.lanczos import SymmetricMatrix
from bantamweight.curvature.mean_loss import LossFunction
from bantamweight.curvature.result import Conditions, Result
from bantamweight.errors import BantamweightError

FEWEST_SAMPLES = 8  # below this a standard error says little


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace(Result):
    """An unbiased estimate of a trace."""

    value: float
    standard_error: float
    samples: np.ndarray  # the independent estimates that were averaged
    products: int
    method: str
    conditions: Conditions | None

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Where the true trace lies with this confidence (Student's t, the samples taken as normal)."""
        half = student_t(0.5 + confidence / 2, len(self.samples) - 1) * self.standard_error
        return self.value - half, self.value + half

    def __str__(self) -> str:
        low, high = self.interval()
        return (
            f"Trace of the Hessian: {self.value:.6g} +- {self.standard_error:.2g} (95%: {low:.6g} to {high:.6g}; "
            f"{self.method}, {self.products} products)\n  {self.conditions}"
        )

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """The running estimate with its standard error: a matplotlib Figure, saved if `path` is given."""
        from bantamweight.curvature.plots import plot_trace

        return plot_trace(self, path)


def trace(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Any,
    *,
    method: str = "hutch++",
    products: int = 60,
    tol: float | None = None,
    blocks: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: Any = None,
    **options: Any,
) -> Trace:
    """The trace of the mean loss's Hessian.

    Args:
        model, loss_fn, data, options: as `Hessian` takes them.
        method: "hutchinson", or "hutch++", which takes the trace over the dominant directions exactly and probes only
            the rest: far fewer products where few eigenvalues dominate.
        products: Hessian-vector products at most, at least 8 (hutch++: 24).
        tol: stop as soon as the standard error is at most this part of the estimate.
        blocks: restrict to a diagonal block.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> data = (torch.eye(2), torch.zeros(2, 1))
        >>> round(trace(model, nn.functional.mse_loss, data, method="hutchinson", products=8).value, 4)
        2.0
    """
    hessian = Hessian(model, loss_fn, data, blocks=blocks, **options)
    estimate = trace_of(hessian, method=method, products=products, tol=tol, seed=seed, progress=progress)
    return Trace(**{**vars(estimate), "conditions": hessian.conditions})


def trace_of(
    matrix: SymmetricMatrix,
    *,
    method: str = "hutch++",
    products: int = 60,
    tol: float | None = None,
    seed: int = 0,
    progress: Any = None,
) -> Trace:
    """`trace` of any symmetric matrix."""
    if method not in ("hutchinson", "hutch++"):
        raise BantamweightError(f"method is {method!r}, but must be 'hutchinson' or 'hutch++'")
    least = FEWEST_SAMPLES if method == "hutchinson" else 3 * FEWEST_SAMPLES
    if products < least:
        raise BantamweightError(f"products is {products}, but {method} needs at least {least} for a standard error")
    generator = torch.Generator().manual_seed(seed)
    sketch = min(products // 3, matrix.size) if method == "hutch++" else 0
    used, exact = 0, 0.0
    Q = torch.empty(0, matrix.size, dtype=matrix.dtype, device=matrix.device)
    samples: list[float] = []
    with tqdm(total=products, desc=f"trace ({method})", unit="product", leave=False, disable=progress) as bar:
        if sketch:
            images = []
            for _ in range(sketch):
                images.append(_flat(matrix.product(rademacher(matrix, generator))))
                bar.update()
            Q = torch.linalg.qr(torch.stack(images).T)[0].T.contiguous()
            for q in Q:  # tr(Q H Q^T), the exact part
                exact += vectors.dot(matrix.product(q), _like(q, matrix))
                bar.update()
            used = 2 * sketch
        while used < products:
            probe = rademacher(matrix, generator)
            if sketch:
                probe = probe - Q.T @ (Q @ probe)
            samples.append(exact + vectors.dot(matrix.product(probe), _like(probe, matrix)))
            used += 1
            bar.update()
            error = standard_error(samples)
            if tol is not None and len(samples) >= FEWEST_SAMPLES and error <= tol * abs(float(np.mean(samples))):
                break
    return Trace(
        value=float(np.mean(samples)),
        standard_error=standard_error(samples),
        samples=np.asarray(samples),
        products=used,
        method=method,
        conditions=None,
    )


def block_traces(
    hessian: Hessian, blocks: Mapping[str, Sequence[str]], *, products: int = 60, seed: int = 0, progress: Any = None
) -> dict[str, Trace]:
    """The trace of every diagonal block from the same products: <v_b, (H v)_b> has the block's trace as its mean.

    The other blocks' probes enter as noise, which the standard errors include; in return the number of products does
    not grow with the number of blocks.
    """
    if products < FEWEST_SAMPLES:
        raise BantamweightError(
            f"products is {products}, but at least {FEWEST_SAMPLES} are needed for a standard error"
        )
    generator = torch.Generator().manual_seed(seed)
    number = {name: i for i, name in enumerate(hessian.names)}
    samples: dict[str, list[float]] = {block: [] for block in blocks}
    for _ in tqdm(range(products), desc="trace of every block", unit="product", leave=False, disable=progress):
        probe = rademacher(hessian, generator)
        parts, image = hessian.split(probe), hessian.product(probe)
        for block, names in blocks.items():
            chosen = [number[name] for name in names]
            samples[block].append(vectors.dot([image[i] for i in chosen], [parts[i] for i in chosen]))
    return {
        block: Trace(
            value=float(np.mean(values)),
            standard_error=standard_error(values),
            samples=np.asarray(values),
            products=products,
            method="hutchinson, shared probes",
            conditions=hessian.conditions,
        )
        for block, values in samples.items()
    }


def rademacher(matrix: SymmetricMatrix, generator: torch.Generator) -> Tensor:
    """+-1 with equal chance, flat; drawn on the CPU so that every device sees the same."""
    signs = torch.randint(0, 2, (matrix.size,), generator=generator, dtype=torch.int8)
    return (2 * signs - 1).to(matrix.device, matrix.dtype)


def standard_error(samples: Sequence[float]) -> float:
    return float(np.std(samples, ddof=1) / np.sqrt(len(samples))) if len(samples) > 1 else float("inf")


def student_t(probability: float, degrees: int) -> float:
    """The quantile of Student's t by its expansion in 1 / degrees (Abramowitz and Stegun 26.7.5); for 5 and more."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees ** (i + 1) for i, term in enumerate(terms))


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _like(vector: Tensor, matrix: SymmetricMatrix) -> list[Tensor]:
    """The flat vector cut like the matrix's products."""
    return matrix.split(vector) if isinstance(matrix, Hessian) else [vector]
