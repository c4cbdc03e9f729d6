"""The kernels as functions of tensors: eager calls go straight to the extension, compiled graphs see torch ops."""

from .lowbit_linear import describe_linear, lowbit_linear, pack_linear, unpack_linear

__all__ = ["describe_linear", "lowbit_linear", "pack_linear", "unpack_linear"]
