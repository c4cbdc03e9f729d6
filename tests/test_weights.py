"""QuantizedWeight: what it means, and what it refuses."""

import pytest
import torch
from bantamweight import QuantizedWeight
from bantamweight.errors import BantamweightError
from bantamweight.weights import ConvGeometry, conv_matrix, conv_weight
from hypothesis import given
from hypothesis import strategies as st


def codes_of(*shape: int, levels: int = 16) -> torch.Tensor:
    return torch.randint(0, levels, shape, dtype=torch.uint8)


@given(n=st.integers(0, 9), k=st.integers(0, 40), group=st.integers(1, 50), levels=st.sampled_from([2, 3, 4, 15, 256]))
def test_dequantize_is_the_definition(n: int, k: int, group: int, levels: int) -> None:
    groups = -(-k // min(group, max(k, 1)))
    scale, zero = torch.rand(n, groups), torch.rand(n, groups) * levels
    w = QuantizedWeight.from_codes(codes_of(n, k, levels=levels), scale, zero, group_size=group, levels=levels)
    dense = w.dequantize()
    assert dense.shape == (n, k) and w.n_groups == groups
    for row in range(n):
        for column in range(k):
            g = column // w.group_size
            expected = scale[row, g] * (float(w.codes[row, column]) - zero[row, g])
            assert dense[row, column] == expected


@pytest.mark.parametrize(
    ("levels", "bits", "scheme"),
    [(3, 2, "ternary"), (4, 2, "W2"), (7, 3, "W3"), (8, 3, "W3"), (15, 4, "W4"), (16, 4, "W4"), (256, 8, "W8")],
)
def test_bits_and_scheme(levels: int, bits: int, scheme: str) -> None:
    w = QuantizedWeight.from_codes(codes_of(4, 32, levels=levels), 1.0, 0.0, levels=levels)
    assert (w.bits, w.scheme) == (bits, scheme)
    grouped = QuantizedWeight.from_codes(w.codes, 1.0, 0.0, levels=levels, group_size=8)
    assert grouped.scheme == f"{scheme}-g8" and grouped.n_groups == 4


@pytest.mark.parametrize(("greatest", "levels"), [(0, 3), (2, 3), (3, 4), (7, 8), (8, 16), (16, 256), (255, 256)])
def test_levels_are_inferred_from_the_codes(greatest: int, levels: int) -> None:
    codes = torch.tensor([[0, greatest]], dtype=torch.uint8)
    assert QuantizedWeight.from_codes(codes, 1.0, 0.0).levels == levels


def test_scales_broadcast() -> None:
    codes = codes_of(3, 8)
    for scale in (2.0, torch.tensor(2.0), torch.full((3,), 2.0), torch.full((3, 1), 2), torch.full((3, 2), 2.0)):
        w = QuantizedWeight.from_codes(codes, scale, 8, group_size=4, levels=16)
        assert w.scale.dtype == torch.float32 and w.scale.tolist() == [[2.0, 2.0]] * 3


def test_a_group_longer_than_the_row_is_the_row() -> None:
    assert QuantizedWeight.from_codes(codes_of(2, 10), 1.0, 0.0, group_size=128).group_size == 10


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"codes": torch.zeros(2, 4)}, "codes are float32 [2, 4], but must be a uint8 tensor"),
        ({"codes": torch.zeros(8, dtype=torch.uint8)}, "codes are uint8 [8], but must be a uint8 tensor [out, in]"),
        ({"codes": [[0]]}, "codes are a list"),
        ({"codes": torch.full((2, 4), 16, dtype=torch.uint8)}, "a code is 16, but codes of 16 levels go from 0 to 15"),
        ({"scale": torch.ones(3)}, "scale is float32 [3], but 2 rows of 4 columns in groups of 4 need"),
        ({"scale": torch.ones(2, 2)}, "scale is float32 [2, 2]"),
        ({"scale": float("nan")}, "scale holds NaN or infinity"),
        ({"scale": torch.ones(2, dtype=torch.complex64)}, "scale is complex64 [2]"),
        ({"zero": torch.tensor([0.0, float("inf")])}, "zero holds NaN or infinity"),
        ({"levels": 1}, "levels is 1, but a code has 2 to 256 levels"),
        ({"levels": 257}, "levels is 257"),
        ({"group_size": 0}, "group_size is 0, but must be a whole number of columns from 1"),
        ({"group_size": 2.0}, "group_size is 2.0"),
    ],
)
def test_refuses_with_a_sentence(change: dict, says: str) -> None:
    parts = {"codes": codes_of(2, 4), "scale": 1.0, "zero": 8.0, "levels": 16, "group_size": 4} | change
    with pytest.raises(BantamweightError) as caught:
        QuantizedWeight.from_codes(**parts)
    assert says in str(caught.value)


def test_equals_sees_every_part() -> None:
    def make(**change: object) -> QuantizedWeight:
        parts = {"codes": torch.arange(8, dtype=torch.uint8).view(2, 4), "scale": 1.0, "zero": 8.0, "levels": 16}
        return QuantizedWeight.from_codes(**(parts | change))  # type: ignore[arg-type]

    assert make().equals(make())
    for change in ({"scale": 2.0}, {"zero": 7.0}, {"levels": 15}, {"group_size": 2}, {"codes": codes_of(2, 5)}):
        assert not make().equals(make(**change))


def test_conv_matrix_is_channels_last() -> None:
    weight = torch.randn(4, 3, 5, 2)
    matrix = conv_matrix(weight)
    assert matrix.shape == (4, 30)
    for ky, kx, c in ((0, 0, 0), (1, 1, 2), (4, 0, 1)):
        assert torch.equal(matrix[:, (ky * 2 + kx) * 3 + c], weight[:, c, ky, kx])
    assert torch.equal(conv_weight(matrix, 5, 2), weight)
    with pytest.raises(BantamweightError, match="30 columns do not split into a 4x2 kernel"):
        conv_weight(matrix, 4, 2)


def test_geometry_reads_a_convolution() -> None:
    same = ConvGeometry.of(torch.nn.Conv2d(4, 8, (3, 2), padding="same", dilation=(2, 1)))
    assert same.sides == (0, 1, 2, 2)
    assert ConvGeometry.of(torch.nn.Conv2d(4, 8, 3, padding="valid")).padding == (0, 0)
    assert ConvGeometry.of(torch.nn.Conv2d(4, 8, 3, groups=2)).columns == 18
    w = QuantizedWeight.from_codes(codes_of(8, 18), 1.0, 0.0)
    with pytest.raises(BantamweightError, match="whose matrix has 36 columns"):
        ConvGeometry(in_channels=4, kernel_size=(3, 3)).check(w)
    with pytest.raises(BantamweightError, match="does not divide into 3 groups"):
        ConvGeometry(in_channels=6, kernel_size=(3, 3), groups=3).check(w)


def test_bytes_on_disk() -> None:
    ternary = QuantizedWeight.from_codes(codes_of(10, 99, levels=3), 1.0, 1.0, levels=3)
    assert ternary.nbytes_on_disk == 10 * 20 + 40
    affine = QuantizedWeight.from_codes(codes_of(10, 99), 1.0, torch.rand(10, 4), group_size=32, levels=16)
    assert affine.nbytes_on_disk == 10 * 50 + 2 * 160
