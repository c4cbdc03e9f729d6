"""Post-training quantization: a method, calibration data, and the driver that takes them through a model."""

from .driver import preset, quantize, quantize_
from .gpfq import GPFQ
from .method import LayerwiseMethod
from .report import LayerReport, QuantizationReport, SkippedLayer
from .round_to_nearest import RoundToNearest

__all__ = [
    "GPFQ",
    "LayerReport",
    "LayerwiseMethod",
    "QuantizationReport",
    "RoundToNearest",
    "SkippedLayer",
    "preset",
    "quantize",
    "quantize_",
]
