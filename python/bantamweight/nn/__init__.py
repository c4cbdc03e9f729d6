"""Quantized layers, simulated and packed, and the ways between them."""

from .embedding import PackedEmbedding, SimulatedEmbedding
from .fold import fold_batchnorm
from .fuse import PackedConvChain, fuse_convolutions
from .fuse_transformer import FusedBertLayer, FusedEncoderLayer, FusionRecord, FusionReport, fuse
from .fused import PackedChain, PackedFFN, PackedLinears, Stage
from .layer import QuantizedLayer
from .packed import PackedConv2d, PackedLayer, PackedLinear
from .simulated import SimulatedConv2d, SimulatedLayer, SimulatedLinear
from .swap import PackedRecord, PackingReport, pack, pack_, unpack

__all__ = [
    "FusedBertLayer",
    "FusedEncoderLayer",
    "FusionRecord",
    "FusionReport",
    "PackedChain",
    "PackedConv2d",
    "PackedConvChain",
    "PackedEmbedding",
    "PackedFFN",
    "PackedLayer",
    "PackedLinear",
    "PackedLinears",
    "PackedRecord",
    "PackingReport",
    "QuantizedLayer",
    "SimulatedConv2d",
    "SimulatedEmbedding",
    "SimulatedLayer",
    "SimulatedLinear",
    "Stage",
    "fold_batchnorm",
    "fuse",
    "fuse_convolutions",
    "pack",
    "pack_",
    "unpack",
]
