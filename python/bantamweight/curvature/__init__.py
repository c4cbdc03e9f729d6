"""Where a model's loss surface is sharp: eigenvalues, trace and spectral density of its Hessian."""

from bantamweight.curvature.eigenvalues import Eigenvalues, top_eigenvalues
from bantamweight.curvature.hvp import Hessian

__all__ = ["Eigenvalues", "Hessian", "top_eigenvalues"]
