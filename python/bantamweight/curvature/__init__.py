"""Where a model's loss surface is sharp: eigenvalues, trace and spectral density of its Hessian."""

from bantamweight.curvature.density import SpectralDensity, spectral_density
from bantamweight.curvature.eigenvalues import Eigenvalues, top_eigenvalues
from bantamweight.curvature.ggn import GaussNewton, gauss_newton_eigenvalues
from bantamweight.curvature.hvp import Hessian
from bantamweight.curvature.sensitivity import LayerSensitivity, Sensitivity, sensitivity
from bantamweight.curvature.surface import LossSurface, loss_surface
from bantamweight.curvature.trace import Trace, trace

__all__ = [
    "Eigenvalues",
    "GaussNewton",
    "Hessian",
    "LayerSensitivity",
    "LossSurface",
    "Sensitivity",
    "SpectralDensity",
    "Trace",
    "gauss_newton_eigenvalues",
    "loss_surface",
    "sensitivity",
    "spectral_density",
    "top_eigenvalues",
    "trace",
]
