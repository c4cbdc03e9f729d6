"""Quantized layers, simulated and packed, and the ways between them."""

from .conv_chain import PackedConvChain
from .embedding import PackedEmbedding, SimulatedEmbedding
from .fold import fold_batchnorm
from .fuse import FusionRecord, FusionReport, fuse
from .fused import PackedChain, PackedFFN, PackedLinears, Stage
from .layer import QuantizedLayer
from .packed import PackedConv2d, PackedLinear
from .packed_layer import PackedLayer
from .simulated import SimulatedConv2d, SimulatedLayer, SimulatedLinear
from .swap import PackedRecord, PackingReport, pack, pack_, unpack
from .transformer_blocks import FusedBertLayer, FusedEncoderLayer

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
    "pack",
    "pack_",
    "unpack",
]
