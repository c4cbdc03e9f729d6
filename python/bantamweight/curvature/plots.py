"""The pictures of curvature results. Each returns a matplotlib Figure, and saves it (atomically) to `path` if given."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from bantamweight.curvature.result import atomic_path

if TYPE_CHECKING:
    from bantamweight.curvature.eigenvalues import Eigenvalues

Path = str | os.PathLike[str] | None


def new_figure(width: float = 6.4, height: float = 4.0) -> tuple[Any, Any]:
    """(figure, axes) without pyplot, so that no window system and no global state is touched."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib; install it with: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def finish(figure: Any, path: Path) -> Any:
    if path is not None:
        with atomic_path(path) as partial:
            figure.savefig(partial, dpi=120)
    return figure


def plot_eigenvalues(result: Eigenvalues, path: Path = None) -> Any:
    figure, axes = new_figure()
    ranks = np.arange(1, len(result.values) + 1)
    axes.axhline(0.0, color="0.6", linewidth=0.8)
    axes.errorbar(ranks, result.values, yerr=result.residuals, fmt="o", capsize=4, color="C0")
    axes.vlines(ranks, 0.0, result.values, color="C0", alpha=0.4)
    axes.set_xticks(ranks)
    axes.set_xlabel(f"eigenvalue ({result.which.replace('_', ' ')})")
    axes.set_ylabel("curvature (bar: residual)")
    axes.set_title("Hessian eigenvalues" + ("" if result.converged else " (not converged)"))
    return finish(figure, path)
