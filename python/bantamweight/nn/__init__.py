"""Quantized layers, simulated and packed."""

from .simulated import SimulatedConv2d, SimulatedLinear

__all__ = ["SimulatedConv2d", "SimulatedLinear"]
