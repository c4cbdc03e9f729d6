"""Canonical bit packing: the form in which codes live on disk and in a state dict, the same on every machine.

Codes are packed row by row, the first code in the least significant place, and each row is padded
with zeros to whole bytes:

========  ==================================  ====================
levels    packing                             bytes a row of k codes
========  ==================================  ====================
3         ``base3``: five codes a byte        ceil(k / 5)
2, 4      ``bits2``: four codes a byte        ceil(k / 4)
5 .. 8    ``bits3``: eight codes in 3 bytes   ceil(3 k / 8)
9 .. 16   ``bits4``: two codes a byte         ceil(k / 2)
17 .. 256 ``bits8``: one code a byte          k
========  ==================================  ====================
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FormatError


@dataclass(frozen=True, kw_only=True)
class Packing:
    """`codes_per_word` digits of base `base` make one little-endian word of `bytes_per_word` bytes."""

    name: str
    base: int
    codes_per_word: int
    bytes_per_word: int

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k codes; a last, partial word keeps only the bytes it needs."""
        if self.base == 3:
            return -(-k // 5)
        return -(-k * self.bytes_per_word // self.codes_per_word)

    @property
    def word_dtype(self) -> Any:
        return np.uint8 if self.bytes_per_word == 1 else np.uint32


PACKINGS = {
    packing.name: packing
    for packing in (
        Packing(name="base3", base=3, codes_per_word=5, bytes_per_word=1),
        Packing(name="bits2", base=4, codes_per_word=4, bytes_per_word=1),
        Packing(name="bits3", base=8, codes_per_word=8, bytes_per_word=3),
        Packing(name="bits4", base=16, codes_per_word=2, bytes_per_word=1),
        Packing(name="bits8", base=256, codes_per_word=1, bytes_per_word=1),
    )
}


def bits_for(levels: int) -> int:
    """Bits a code in memory: the narrowest of 2, 3, 4 and 8 that holds `levels` values."""
    return 2 if levels <= 4 else 3 if levels <= 8 else 4 if levels <= 16 else 8


def packing_for(levels: int) -> Packing:
    """The packing that codes of `levels` values use; three levels take 1.6 bits instead of 2."""
    return PACKINGS["base3" if levels == 3 else f"bits{bits_for(levels)}"]


def pack_codes(codes: Tensor, levels: int) -> Tensor:
    """Canonical bytes of codes.

    Args:
        codes: uint8 [n, k] with values 0 .. levels - 1.
        levels: how many values a code may take, 2 .. 256.

    Returns:
        uint8 [n, packing_for(levels).row_bytes(k)].

    Example:
        >>> import torch
        >>> pack_codes(torch.tensor([[1, 2, 3]], dtype=torch.uint8), levels=4)
        tensor([[57]], dtype=torch.uint8)
    """
    packing = packing_for(levels)
    n, k = codes.shape
    if packing.codes_per_word == 1:
        return codes.clone(memory_format=torch.contiguous_format)
    words = -(-k // packing.codes_per_word)
    digits = _widened(codes, words * packing.codes_per_word).reshape(n, words, packing.codes_per_word)
    word: Any = np.zeros((n, words), packing.word_dtype)
    for place in reversed(range(packing.codes_per_word)):  # Horner's rule
        word *= packing.word_dtype(packing.base)
        word += digits[:, :, place]
    parts = np.empty((n, words, packing.bytes_per_word), np.uint8)
    for i in range(packing.bytes_per_word):
        parts[:, :, i] = (word >> 8 * i) & 255
    row_bytes = packing.row_bytes(k)
    packed = parts.reshape(n, words * packing.bytes_per_word)[:, :row_bytes]
    return torch.from_numpy(np.ascontiguousarray(packed)).to(codes.device)


def unpack_codes(packed: Tensor, levels: int, k: int) -> Tensor:
    """The exact inverse of `pack_codes`.

    Args:
        packed: uint8 [n, packing_for(levels).row_bytes(k)].
        levels: as it was packed.
        k: codes a row.

    Returns:
        uint8 [n, k].

    Raises:
        FormatError: the width is not that of k codes, or a byte holds no valid digits.
    """
    packing = packing_for(levels)
    n = packed.shape[0]
    if packed.ndim != 2 or packed.dtype != torch.uint8 or packed.shape[1] != packing.row_bytes(k):
        raise FormatError(
            f"packed codes of {packed.dtype} {list(packed.shape)} do not hold rows of {k} codes of {levels} levels "
            f"({packing.row_bytes(k)} uint8 a row in {packing.name} packing); load a file that is whole"
        )
    if packing.codes_per_word == 1:
        return packed.clone(memory_format=torch.contiguous_format)
    if packing.base == 3 and packed.numel() > 0 and int(packed.max()) >= 3**5:
        raise FormatError("a byte of base-3 codes is above 242; the file is damaged, load a whole copy")
    words = -(-k // packing.codes_per_word)
    parts = _widened(packed, words * packing.bytes_per_word).reshape(n, words, packing.bytes_per_word)
    word = parts[:, :, 0].astype(packing.word_dtype)
    for i in range(1, packing.bytes_per_word):
        word |= parts[:, :, i].astype(packing.word_dtype) << 8 * i
    digits = np.empty((n, words, packing.codes_per_word), np.uint8)
    for place in range(packing.codes_per_word):
        if packing.base == 3:
            rest = word // 3
            digits[:, :, place] = word - 3 * rest
            word = rest
        else:  # shifts and masks are many times faster than divisions
            digits[:, :, place] = word & (packing.base - 1)
            word >>= packing.base.bit_length() - 1
    codes = digits.reshape(n, words * packing.codes_per_word)[:, :k]
    return torch.from_numpy(np.ascontiguousarray(codes)).to(packed.device)


def _widened(rows: Tensor, width: int) -> np.ndarray:
    """The rows on the CPU, with zeros behind them up to whole words. NumPy packs twice as fast as torch."""
    narrow = rows.detach().cpu().numpy()
    if narrow.shape[1] == width:
        return narrow
    wide = np.zeros((narrow.shape[0], width), np.uint8)
    wide[:, : narrow.shape[1]] = narrow
    return wide
