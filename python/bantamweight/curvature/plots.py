"""The pictures of curvature results. Each returns a matplotlib Figure, and saves it (atomically) to `path` if given."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bantamweight.io.atomic import write_atomically

if TYPE_CHECKING:
    from bantamweight.curvature.density import SpectralDensity
    from bantamweight.curvature.eigenvalues import Eigenvalues
    from bantamweight.curvature.surface import LossSurface
    from bantamweight.curvature.trace import Trace
    from bantamweight.quantize.plan import BitPlan

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
        suffix = os.path.splitext(os.fspath(path))[1].lstrip(".") or "png"
        image = io.BytesIO()
        figure.savefig(image, format=suffix, dpi=120)
        write_atomically(path, image.getvalue())
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


def plot_trace(result: Trace, path: Path = None) -> Any:
    figure, axes = new_figure()
    count = np.arange(1, len(result.samples) + 1)
    running = np.cumsum(result.samples) / count
    spread = np.array([np.std(result.samples[:n], ddof=1) / np.sqrt(n) if n > 1 else np.nan for n in count])
    axes.plot(count, running, color="C0", label="mean so far")
    axes.fill_between(
        count, running - 2 * spread, running + 2 * spread, color="C0", alpha=0.2, label="2 standard errors"
    )
    axes.plot(count, result.samples, ".", color="0.5", markersize=3, label="one probe")
    axes.set_xlabel("probes")
    axes.set_ylabel("trace")
    axes.legend(frameon=False)
    axes.set_title(f"Trace of the Hessian: {result.value:.4g} +- {result.standard_error:.2g}")
    return finish(figure, path)


def plot_density(result: SpectralDensity, path: Path = None) -> Any:
    figure, axes = new_figure()
    axes.semilogy(result.grid, np.maximum(result.density, 1e-12), color="C0")
    axes.set_ylim(max(float(result.density.max()) * 1e-8, 1e-10), float(result.density.max()) * 3)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    axes.set_title("Spectral density of the Hessian")
    return finish(figure, path)


def plot_bars(
    names: Sequence[str], values: Sequence[float], label: str, path: Path = None, errors: Sequence[float] | None = None
) -> Any:
    """A horizontal bar a name, the first one on top."""
    figure, axes = new_figure(height=1.2 + 0.24 * len(names))
    at = np.arange(len(names))
    axes.barh(at, values, xerr=errors, color="C0", alpha=0.8, error_kw={"elinewidth": 1, "capsize": 2})
    axes.set_yticks(at, [name or "(model)" for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    return finish(figure, path)


def plot_surface(result: LossSurface, path: Path = None) -> Any:
    figure, axes = new_figure(10.0, 5.0)
    axes.remove()
    along, across = np.meshgrid(result.steps, result.steps, indexing="ij")
    solid = figure.add_subplot(1, 2, 1, projection="3d")
    solid.tick_params(labelsize=7)
    solid.plot_surface(along, across, result.loss, cmap="viridis", linewidth=0)
    flat = figure.add_subplot(1, 2, 2)
    contours = flat.contourf(along, across, result.loss, levels=20, cmap="viridis")
    flat.plot([0], [0], "r+", markersize=10)
    figure.colorbar(contours, ax=flat, label="loss")
    solid.set_box_aspect(None, zoom=0.82)  # or its labels run into the panel beside it
    for panel, gap in ((solid, 8), (flat, 4)):
        panel.set_xlabel(f"eigenvector of {result.curvatures[0]:.3g}", labelpad=gap)
        panel.set_ylabel(f"eigenvector of {result.curvatures[1]:.3g}", labelpad=gap)
    return finish(figure, path)


def plot_bits(plan: BitPlan, path: Path = None) -> Any:
    figure, axes = new_figure(height=1.2 + 0.24 * len(plan.layers))
    at = np.arange(len(plan.layers))
    chosen = [layer.bits for layer in plan.layers]
    axes.barh(at, chosen, color=[f"C{plan.choices.index(bits)}" for bits in chosen])
    axes.set_yticks(at, [layer.name or "(model)" for layer in plan.layers], fontsize=8)
    axes.set_xticks(plan.choices)
    axes.invert_yaxis()
    axes.set_xlabel("bits a weight")
    axes.set_title(f"{plan.average_bits:.2f} bits on average, {plan.bytes:,} bytes")
    return finish(figure, path)
