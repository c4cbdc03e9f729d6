"""Training that prepares a network for quantization."""

from .hero import HERO

__all__ = ["HERO"]
