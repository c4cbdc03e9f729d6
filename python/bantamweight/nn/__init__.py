"""Quantized layers, simulated and packed, and the ways between them."""

from .embedding import PackedEmbedding, SimulatedEmbedding
from .fold import fold_batchnorm
from .fuse import PackedConvChain, fuse_convolutions
from .layer import QuantizedLayer
from .packed import PackedConv2d, PackedLayer, PackedLinear
from .simulated import SimulatedConv2d, SimulatedLayer, SimulatedLinear
from .swap import PackedRecord, PackingReport, pack, pack_, unpack

__all__ = [
    "PackedConv2d",
    "PackedConvChain",
    "PackedEmbedding",
    "PackedLayer",
    "PackedLinear",
    "PackedRecord",
    "PackingReport",
    "QuantizedLayer",
    "SimulatedConv2d",
    "SimulatedEmbedding",
    "SimulatedLayer",
    "SimulatedLinear",
    "fold_batchnorm",
    "fuse_convolutions",
    "pack",
    "pack_",
    "unpack",
]
