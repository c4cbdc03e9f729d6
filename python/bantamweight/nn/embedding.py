"""Embedding tables of low-bit codes: simulated, and packed with each row's codes beside its scales."""

from typing import Self

import torch
from torch import Tensor, empty, float32, nn
from torch.compiler import is_compiling
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)

from .._C import embedding_forward
from ..errors import BantamweightError, UnsupportedLayerError
from ..io.bitpack import bits_for
from ..ops.embedding import check_index, check_lookup, describe_embedding, pack_embedding, unpack_embedding
from ..weights import QuantizedWeight
from .layer import EmbeddingAttributes
from .packed_layer import PackedLayer
from .simulated import SimulatedLayer


class SimulatedEmbedding(EmbeddingAttributes, SimulatedLayer):
    """`nn.Embedding` with the table a QuantizedWeight [num_embeddings, embedding_dim] stands for.

    `padding_idx` is kept as torch keeps it for inference: the row is whatever the table holds.

    Example:
        >>> import torch
        >>> from bantamweight import QuantizedWeight
        >>> table = QuantizedWeight.from_codes(torch.randint(0, 16, (9, 4), dtype=torch.uint8), 0.1, 8.0, levels=16)
        >>> SimulatedEmbedding(table)(torch.tensor([[0, 8]])).shape
        torch.Size([1, 2, 4])
    """

    def __init__(self, quantized: QuantizedWeight, *, padding_idx: int | None = None) -> None:
        super().__init__(quantized, None, None)
        self.num_embeddings, self.embedding_dim = quantized.out_features, quantized.in_features
        self.padding_idx = _row_of_padding(padding_idx, self.num_embeddings)

    @classmethod
    def from_float(cls, embedding: nn.Embedding, quantized: QuantizedWeight) -> Self:
        """Takes the place of `embedding`.

        Raises:
            BantamweightError: the table has another shape than the layer.
            UnsupportedLayerError: the layer renormalizes its rows (max_norm), which a table of codes cannot.
        """
        if embedding.max_norm is not None:
            raise UnsupportedLayerError(
                f"an embedding with max_norm={embedding.max_norm} changes its rows at every call, which codes cannot; "
                "set max_norm to None once it is trained"
            )
        if (quantized.out_features, quantized.in_features) != (embedding.num_embeddings, embedding.embedding_dim):
            raise BantamweightError(
                f"a table of {quantized.out_features}x{quantized.in_features} came for an embedding of "
                f"{embedding.num_embeddings}x{embedding.embedding_dim}; pass the table of this layer"
            )
        return cls(quantized, padding_idx=embedding.padding_idx)

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight, self.padding_idx)

    def extra_repr(self) -> str:
        return _extra_repr(self)


class PackedEmbedding(EmbeddingAttributes, PackedLayer):
    """`nn.Embedding` that gathers rows of 2, 3, 4 or 8-bit codes and dequantizes them.

    Rows are float32, or of the dtype that the model was converted to (`.half()`, `.bfloat16()`). Equal to the simulated
    form to the last bit. `padding_idx` is kept as torch keeps it for inference: the row is
    whatever the table holds.

    Example:
        >>> import torch
        >>> from bantamweight import QuantizedWeight
        >>> table = QuantizedWeight.from_codes(torch.randint(0, 16, (9, 4), dtype=torch.uint8), 0.1, 8.0, levels=16)
        >>> PackedEmbedding.from_quantized(table)(torch.tensor([[0, 8]])).shape
        torch.Size([1, 2, 4])
    """

    kind = "embedding"
    activation_bits = None
    _fixed = PackedLayer._fixed | {"num_embeddings", "embedding_dim"}

    def __init__(self, quantized: QuantizedWeight, *, padding_idx: int | None = None) -> None:
        super().__init__(quantized, None)
        self.num_embeddings, self.embedding_dim = quantized.out_features, quantized.in_features
        self.padding_idx = _row_of_padding(padding_idx, self.num_embeddings)

    @classmethod
    def from_quantized(cls, table: QuantizedWeight, *, padding_idx: int | None = None) -> Self:
        """Packs the table for the best kernel of this machine (or the one BANTAMWEIGHT_FORCE_KERNEL allows).

        Raises:
            KernelError: the table is too large.
            BantamweightError: padding_idx is outside the table.
        """
        return cls(table, padding_idx=padding_idx)

    def pack(self, quantized: QuantizedWeight) -> Tensor:
        return pack_embedding(quantized)

    def adopt(self, layout: Tensor) -> None:
        found = describe_embedding(layout)
        came = (found.num_embeddings, found.embedding_dim, found.bits)
        if came != (self.rows, self.columns, bits_for(self.levels)):
            self.refuse_layout("{}x{} codes of {} bits".format(*came))
        self.kernel = found.kernel

    @property
    def quantized(self) -> QuantizedWeight:
        return unpack_embedding(self.layout, self.levels)

    def forward(self, input: Tensor) -> Tensor:
        """The rows [..., embedding_dim] at the input, int64 or int32 [...] on the CPU.

        Raises:
            BantamweightError: the input is not such a tensor, or holds an index outside the table.
        """
        if type(input) is not Tensor or is_compiling() or is_tracing():
            if not isinstance(input, Tensor):
                check_index(input, self.name_of_layer)  # which says what came
            rows = torch.ops.bantamweight.lowbit_embedding(input, self.layout, self.embedding_dim)
            return rows.to(self._dtype)
        # As in PackedLinear: a short sentence takes the kernel a microsecond.
        k, width = self.embedding_dim, 8 if input.dtype is torch.int64 else 4
        if (width == 4 and input.dtype is not torch.int32) or not input.is_contiguous() or not input.is_cpu:
            return self.forward(check_index(input, self.name_of_layer))
        y = empty(*input.shape, k)
        if y.dtype is not float32 or not y.is_cpu:  # torch.set_default_dtype, torch.set_default_device
            y = torch.empty((*input.shape, k), dtype=float32, device="cpu")
        layout, layout_bytes, _ = self._at
        if self._buffers["layout"].data_ptr() != layout:  # type: ignore[union-attr]
            layout, layout_bytes, _ = self._addresses
        status = embedding_forward(layout, layout_bytes, input.data_ptr(), width, input.numel(), y.data_ptr(), k)
        if status:
            check_lookup(status, input, self.num_embeddings, self.name_of_layer)
        return y if self._dtype is float32 else y.to(self._dtype)

    def extra_repr(self) -> str:
        return _extra_repr(self)


def _row_of_padding(padding_idx: int | None, rows: int) -> int | None:
    """padding_idx counted from the start, as nn.Embedding stores it."""
    if padding_idx is None:
        return None
    if not isinstance(padding_idx, int) or not -rows <= padding_idx < rows:
        raise BantamweightError(f"padding_idx is {padding_idx!r}, but must be one of the {rows} rows, or None")
    return padding_idx % rows


def _extra_repr(layer: SimulatedEmbedding | PackedEmbedding) -> str:
    padding = "" if layer.padding_idx is None else f", padding_idx={layer.padding_idx}"
    kernel = f" {layer.kernel}" if isinstance(layer, PackedEmbedding) else ""
    return f"{layer.num_embeddings}, {layer.embedding_dim}{padding}, {layer.form} {layer.scheme}{kernel}"
