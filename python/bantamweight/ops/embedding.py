"""Rows of a packed embedding table, gathered by index and dequantized to float32.

As in `lowbit_linear`: `nn.PackedEmbedding` calls the extension directly in eager mode, and
``torch.ops.bantamweight.lowbit_embedding`` where a graph is made.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from ..errors import BantamweightError, KernelError
from ..weights import QuantizedWeight
from .lowbit_linear import LIBRARY, check_status

OUT_OF_RANGE = 6  # Status::out_of_range


@dataclass(frozen=True, kw_only=True)
class EmbeddingLayout:
    """What the header of a packed table says."""

    num_embeddings: int
    embedding_dim: int
    bits: int
    group_size: int
    kernel: str


def pack_embedding(table: QuantizedWeight, kernel: str | None = None) -> Tensor:
    """The table as one record a row (scales, zeros, codes), for the best kernel of this CPU or the one named.

    Args:
        table: codes [num_embeddings, embedding_dim], on the CPU.
        kernel: "avx2", say; None for the best that BANTAMWEIGHT_FORCE_KERNEL allows.

    Returns:
        uint8 [bytes], for this machine's memory only; a file holds the canonical form.

    Raises:
        KernelError: this CPU has no such kernel, or the table is too large.
    """
    isa = _C.embedding_select(kernel or "")
    if kernel is not None and isa != kernel:
        names = [name for name, missing in _C.embedding_variants() if not missing]
        raise KernelError(f"kernel is {kernel!r}, but the embedding kernels of this machine are {', '.join(names)}")
    n, k = table.out_features, table.in_features
    group_size, uniform = min(table.group_size, max(k, 1)), table.uniform_zero is not None
    size = _C.embedding_layout_bytes(n, k, table.bits, group_size, uniform)
    if size < 0:
        raise KernelError(f"no kernel takes a {n}x{k} table; it goes up to 2^31 - 1 rows of 2^24 - 1 columns")
    codes, scale, zero = (part.cpu().contiguous() for part in (table.codes, table.scale, table.zero))
    layout = torch.empty(size, dtype=torch.uint8, device="cpu")
    status = _C.embedding_pack(
        n,
        k,
        table.bits,
        group_size,
        isa,
        codes.data_ptr(),
        scale.data_ptr(),
        zero.data_ptr(),
        uniform,
        layout.data_ptr(),
        size,
    )
    check_status(status, f"packing a {n}x{k} table")
    return layout


def unpack_embedding(layout: Tensor, levels: int) -> QuantizedWeight:
    """The exact inverse of `pack_embedding`; `levels` as in the table that was packed."""
    found = describe_embedding(layout)
    n, k = found.num_embeddings, found.embedding_dim
    groups = -(-k // found.group_size)
    codes = torch.empty((n, k), dtype=torch.uint8, device="cpu")
    scale = torch.empty((n, groups), dtype=torch.float32, device="cpu")
    zero = torch.empty((n, groups), dtype=torch.float32, device="cpu")
    status = _C.embedding_unpack(layout.data_ptr(), layout.numel(), codes.data_ptr(), scale.data_ptr(), zero.data_ptr())
    check_status(status, "unpacking")
    return QuantizedWeight(codes=codes, scale=scale, zero=zero, levels=levels, group_size=found.group_size)


def describe_embedding(layout: Tensor) -> EmbeddingLayout:
    """Reads the shape and the kernel out of a packed table.

    Raises:
        KernelError: the bytes are not a packed table of this machine.
    """
    if layout.dtype != torch.uint8 or not layout.is_cpu or not layout.is_contiguous():
        raise KernelError(
            f"the packed table is {layout.dtype} on {layout.device}, but must be contiguous uint8 on the CPU; "
            "make it with pack_embedding"
        )
    status, n, k, bits, group_size, kernel = _C.embedding_describe(layout.data_ptr(), layout.numel())
    check_status(status, "reading a packed table")
    return EmbeddingLayout(num_embeddings=n, embedding_dim=k, bits=bits, group_size=group_size, kernel=kernel)


def lowbit_embedding(index: Tensor, layout: Tensor, embedding_dim: int) -> Tensor:
    """The rows of a packed table at `index`.

    Args:
        index: int64 or int32 [...], on the CPU, each from 0 to the rows of the table - 1.
        layout: from `pack_embedding`.
        embedding_dim: of the table in the layout.

    Returns:
        float32 [..., embedding_dim].

    Raises:
        BantamweightError: index is not such a tensor, or an index is out of range.
    """
    return torch.ops.bantamweight.lowbit_embedding(index, layout, embedding_dim)


def check_index(index: Tensor, name: str) -> Tensor:
    """index as a contiguous integer tensor on the CPU, or a sentence that says what came and how to mend it."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        came = index.dtype if isinstance(index, Tensor) else f"a {type(index).__name__}"
        raise BantamweightError(f"{name} takes int64 or int32 indices, but {came} came; convert with .long()")
    if not index.is_cpu:
        raise BantamweightError(f"{name} runs on the CPU, but the index is on {index.device}; move it with .cpu()")
    return index.contiguous()


def check_lookup(status: int, index: Tensor, rows: int, name: str) -> None:
    """Turns the status of a lookup into a sentence that names the first index out of range."""
    if status == OUT_OF_RANGE:
        flat = index.reshape(-1)
        at = int(((flat < 0) | (flat >= rows)).nonzero()[0])
        raise BantamweightError(
            f"{name}: index {int(flat[at])} at position {at} is outside its {rows} rows; indices go from 0 to "
            f"{rows - 1}, check the tokenizer or the vocabulary"
        )
    check_status(status, name)


def _embedding_cpu(index: Tensor, layout: Tensor, embedding_dim: int) -> Tensor:
    found = describe_embedding(layout)
    name = f"lowbit_embedding {found.num_embeddings}x{found.embedding_dim}"
    if embedding_dim != found.embedding_dim:
        raise BantamweightError(f"{name}: embedding_dim is {embedding_dim}, but must be that of the packed table")
    index = check_index(index, name)
    y = torch.empty((*index.shape, embedding_dim), dtype=torch.float32, device="cpu")
    status = _C.embedding_forward(
        layout.data_ptr(),
        layout.numel(),
        index.data_ptr(),
        index.itemsize,
        index.numel(),
        y.data_ptr(),
        embedding_dim,
    )
    check_lookup(status, index, found.num_embeddings, name)
    return y


def _embedding_fake(index: Tensor, layout: Tensor, embedding_dim: int) -> Tensor:
    return index.new_empty((*index.shape, embedding_dim), dtype=torch.float32)


LIBRARY.define("lowbit_embedding(Tensor index, Tensor layout, int embedding_dim) -> Tensor")
LIBRARY.impl("lowbit_embedding", _embedding_cpu, "CPU")
torch.library.register_fake("bantamweight::lowbit_embedding", _embedding_fake, lib=LIBRARY)
