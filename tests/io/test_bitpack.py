"""Canonical bit packing: the bytes are the specified ones, and unpacking is their exact inverse."""

import numpy as np
import pytest
import torch
from bantamweight.errors import FormatError
from bantamweight.io.bitpack import PACKINGS, bits_for, pack_codes, packing_for, unpack_codes
from hypothesis import given, settings
from hypothesis import strategies as st


def expected_bytes(row: list[int], levels: int) -> bytes:
    """A row packed by arbitrary-precision integers, from the specification alone."""
    if levels == 3:
        fives = [row[i : i + 5] for i in range(0, len(row), 5)]
        return bytes(sum(code * 3**place for place, code in enumerate(five)) for five in fives)
    bits = bits_for(levels)
    number = sum(code << (bits * place) for place, code in enumerate(row))
    return number.to_bytes(-(-len(row) * bits // 8), "little")


@settings(deadline=None)
@given(
    n=st.integers(0, 5),
    k=st.integers(0, 70),
    levels=st.sampled_from([2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 255, 256]),
    seed=st.integers(0, 2**31),
)
def test_bytes_and_round_trip(n: int, k: int, levels: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, levels, (n, k), dtype=np.uint8))
    packed = pack_codes(codes, levels)
    assert packed.dtype == torch.uint8 and packed.shape == (n, packing_for(levels).row_bytes(k))
    for row in range(n):
        assert bytes(packed[row].tolist()) == expected_bytes(codes[row].tolist(), levels)
    assert torch.equal(unpack_codes(packed, levels, k), codes)


def test_packing_does_not_share_memory_with_the_codes() -> None:
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    packed = pack_codes(codes, 256)
    codes += 1
    assert packed.sum() == 0
    unpack_codes(packed, 256, 8).add_(1)
    assert packed.sum() == 0


def test_strided_codes() -> None:
    codes = torch.randint(0, 8, (30, 7), dtype=torch.uint8)
    assert torch.equal(pack_codes(codes.T, 8), pack_codes(codes.T.contiguous(), 8))


@pytest.mark.parametrize(
    ("levels", "name"), [(2, "bits2"), (3, "base3"), (4, "bits2"), (5, "bits3"), (9, "bits4"), (17, "bits8")]
)
def test_the_narrowest_packing_is_chosen(levels: int, name: str) -> None:
    assert packing_for(levels) is PACKINGS[name]


def test_refuses_what_no_packer_wrote() -> None:
    with pytest.raises(FormatError, match="do not hold rows of 10 codes of 16 levels"):
        unpack_codes(torch.zeros(2, 4, dtype=torch.uint8), 16, 10)
    with pytest.raises(FormatError, match="do not hold rows"):
        unpack_codes(torch.zeros(2, 5), 16, 10)
    with pytest.raises(FormatError, match="above 242"):
        unpack_codes(torch.full((1, 2), 243, dtype=torch.uint8), 3, 10)
