"""The kernels as functions of tensors: eager calls go straight to the extension, compiled graphs see torch ops."""

from .attention import attention
from .embedding import describe_embedding, lowbit_embedding, pack_embedding, unpack_embedding
from .lowbit_conv2d import describe_conv2d, lowbit_conv2d, pack_conv2d, unpack_conv2d
from .lowbit_linear import describe_linear, lowbit_linear, pack_linear, unpack_linear
from .quantized_rows import QuantizedRows, layer_norm_rows, quantize_rows

__all__ = [
    "QuantizedRows",
    "attention",
    "describe_conv2d",
    "describe_embedding",
    "describe_linear",
    "layer_norm_rows",
    "lowbit_conv2d",
    "lowbit_embedding",
    "lowbit_linear",
    "pack_conv2d",
    "pack_embedding",
    "pack_linear",
    "quantize_rows",
    "unpack_conv2d",
    "unpack_embedding",
    "unpack_linear",
]
