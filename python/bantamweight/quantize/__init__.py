"""Post-training quantization: a method, calibration data, and the driver that takes them through a model.

The module itself is callable and does what its function `quantize` does, so that ``bantamweight.quantize(model, ...)``
works whichever of the two the name stands for at the time.
"""

import sys
from types import ModuleType

from .beacon import Beacon
from .driver import preset, quantize, quantize_
from .embedding_table import quantize_embedding
from .gpfq import GPFQ
from .method import LayerwiseMethod
from .report import LayerReport, QuantizationReport, SkippedLayer
from .round_to_nearest import RoundToNearest

__all__ = [
    "GPFQ",
    "Beacon",
    "LayerReport",
    "LayerwiseMethod",
    "QuantizationReport",
    "RoundToNearest",
    "SkippedLayer",
    "preset",
    "quantize",
    "quantize_",
    "quantize_embedding",
]


class _Verb(ModuleType):
    __call__ = staticmethod(quantize)


sys.modules[__name__].__class__ = _Verb
