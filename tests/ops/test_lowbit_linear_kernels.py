"""Every kernel variant of this CPU against the scalar reference, bit for bit."""

import pytest
import torch
from bantamweight import _C
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

LINEAR = [name for name, missing in _C.linear_variants() if not missing]
QUANTIZE = [name for name, missing in _C.quantize_rows_variants() if not missing]
NOT_FINITE = 5


def random_weight(
    n: int, k: int, bits: int, group_size: int, zeros: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    groups = -(-k // group_size) if k else 0
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    scale = torch.rand(n, groups, generator=generator) + 0.1
    if zeros == "uniform":
        zero = torch.full((n, groups), float(2 ** (bits - 1)))
    elif zeros == "integer":
        zero = torch.randint(0, 2**bits, (n, groups), generator=generator).float()
    else:
        zero = torch.rand(n, groups, generator=generator) * 2**bits - 0.5
    return codes, scale, zero


def pack(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, isa: str) -> Tensor:
    n, k = codes.shape
    size = _C.linear_layout_bytes(n, k, bits, group_size, isa)
    memory = torch.empty(size + 64, dtype=torch.uint8)
    layout = memory[-memory.data_ptr() % 64 :][:size]
    status = _C.linear_pack(
        n, k, bits, group_size, isa, codes.data_ptr(), scale.data_ptr(), zero.data_ptr(), layout.data_ptr(), size
    )
    assert status == 0
    return layout


def forward(layout: Tensor, x: Tensor, n: int, bias: Tensor | None) -> tuple[int, Tensor]:
    y = torch.full((x.shape[0], n + 3), torch.nan)  # three columns that nothing may touch
    status = _C.linear_forward(
        layout.data_ptr(),
        layout.numel(),
        x.data_ptr(),
        x.stride(0),
        x.shape[0],
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        y.stride(0),
    )
    assert y[:, n:].isnan().all()
    return status, y[:, :n]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@pytest.mark.parametrize("isa", LINEAR)
@given(
    n=st.one_of(st.integers(0, 20), st.integers(60, 70), st.sampled_from([127, 128, 129, 200])),
    k=st.one_of(st.integers(0, 20), st.integers(60, 70), st.sampled_from([127, 128, 129, 255, 448, 777])),
    m=st.one_of(st.integers(0, 9), st.integers(14, 18), st.sampled_from([31, 33, 48, 70])),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([1, 3, 16, 32, 50, 64, 128, 0]),
    zeros=st.sampled_from(["uniform", "integer", "real"]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_equals_reference(
    isa: str, n: int, k: int, m: int, bits: int, group_size: int, zeros: str, with_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    group_size = group_size or max(k, 1)
    codes, scale, zero = random_weight(n, k, bits, group_size, zeros, generator)
    x = torch.randn(m, k + 5, generator=generator)[:, 2 : 2 + k]  # unaligned rows with gaps between them
    bias = torch.randn(n, generator=generator) if with_bias else None

    layout = pack(codes, scale, zero, bits, group_size, isa)
    assert _C.linear_describe(layout.data_ptr(), layout.numel())[:7] == (0, n, k, bits, group_size, isa, 0)
    status, y = forward(layout, x, n, bias)
    expected_status, expected = forward(pack(codes, scale, zero, bits, group_size, "reference"), x, n, bias)
    assert status == expected_status == 0
    assert same_bits(y, expected)

    back = torch.full_like(codes, 255), torch.empty_like(scale), torch.empty_like(zero)
    pointers = [tensor.data_ptr() for tensor in back]
    assert _C.linear_unpack(layout.data_ptr(), layout.numel(), *pointers) == 0
    assert all(torch.equal(a, b) for a, b in zip(back, (codes, scale, zero), strict=True))


@pytest.mark.parametrize("isa", LINEAR)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 3, 6, 40])
def test_sums_do_not_wrap(isa: str, bits: int, rows: int) -> None:
    """All weights at one end and all activations at the other: int16 sums would wrap, int32 ones must not."""
    n, k = 70, 4096
    for code, zero_point in [(2**bits - 1, 0), (2, 1), (0, 2**bits - 1), (2**bits - 1, 2 ** (bits - 1))]:
        codes = torch.full((n, k), code, dtype=torch.uint8)
        scale, zero = torch.ones(n, 1), torch.full((n, 1), float(zero_point))
        layout = pack(codes, scale, zero, bits, k, isa)
        for activation in (64.0, -64.0, 127.0, -127.0):
            x = torch.full((rows, k), activation)
            x[:, 0] = 127.0  # the row's maximum: the scale is 1 and the codes are x
            status, y = forward(layout, x, n, None)
            assert status == 0
            exact = (code - zero_point) * (activation * (k - 1) + 127.0)
            assert (y == torch.tensor(exact, dtype=torch.float32)).all()


@pytest.mark.parametrize("isa", LINEAR)
def test_outputs_larger_than_the_cache(isa: str) -> None:
    generator = torch.Generator().manual_seed(1)
    n, k, m = 1040, 64, 520  # 2.2 MB, which AMX writes past the caches; 16 rows and 64 channels do not divide it
    codes, scale, zero = random_weight(n, k, 4, k, "uniform", generator)
    x = torch.randn(m, k, generator=generator)
    memory = torch.empty(m * n + 16)
    start = -memory.data_ptr() // 4 % 16  # on a cache line
    expected = forward(pack(codes, scale, zero, 4, k, "reference"), x, n, None)[1]
    layout = pack(codes, scale, zero, 4, k, isa)
    y = memory[start : start + m * n].view(m, n)
    status = _C.linear_forward(layout.data_ptr(), layout.numel(), x.data_ptr(), k, m, 0, y.data_ptr(), n)
    assert status == 0
    assert same_bits(y, expected)


@pytest.mark.parametrize("isa", LINEAR)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_is_reported(isa: str, bad: float) -> None:
    generator = torch.Generator().manual_seed(0)
    codes, scale, zero = random_weight(5, 100, 4, 100, "uniform", generator)
    layout = pack(codes, scale, zero, 4, 100, isa)
    for row, column in [(0, 0), (1, 63), (2, 99)]:
        x = torch.randn(3, 100, generator=generator)
        x[row, column] = bad
        assert forward(layout, x, 5, None)[0] == NOT_FINITE


@pytest.mark.parametrize("isa", LINEAR)
def test_ceiling_picks_the_variant(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", isa)
    assert _C.linear_select() == isa


def quantize_rows(x: Tensor, group_size: int, isa: str) -> tuple[int, Tensor, Tensor, Tensor]:
    m, k = x.shape
    groups = -(-k // group_size) if k else 0
    q = torch.full((m, _C.padded_row_bytes(k)), 99, dtype=torch.int8)
    scale, sums = torch.empty(m), torch.empty(m, groups, dtype=torch.int32)
    status = _C.quantize_rows(
        x.data_ptr(), x.stride(0), m, k, group_size, q.data_ptr(), scale.data_ptr(), sums.data_ptr(), isa
    )
    return status, q, scale, sums


@pytest.mark.parametrize("isa", QUANTIZE)
@given(
    m=st.integers(0, 5),
    k=st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 129, 192, 777, 1024])),
    group_size=st.sampled_from([1, 3, 16, 32, 50, 64, 128, 0]),
    exponent=st.sampled_from([-149, -140, -127, -126, -30, 0, 30, 100, 127]),
    halves=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_quantize_rows_equals_reference(
    isa: str, m: int, k: int, group_size: int, exponent: int, halves: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(m, k + 3, generator=generator)[:, 1 : 1 + k] * 2 - 1
    if halves:  # exact ties between two codes
        x = torch.randint(-254, 255, (m, k), generator=generator).float() / 254
        x[:, :1] = 1.0
    x = x * 2.0 ** max(exponent, -100) * 2.0 ** min(exponent + 100, 0)  # 2 ** -149 itself needs two steps
    group_size = group_size or max(k, 1)
    status, q, scale, sums = quantize_rows(x, group_size, isa)
    expected_status, expected_q, expected_scale, expected_sums = quantize_rows(x, group_size, "reference")
    assert status == expected_status == 0
    assert torch.equal(q, expected_q)
    assert same_bits(scale, expected_scale)
    assert torch.equal(sums, expected_sums)


def test_forward_refuses_what_are_no_eight_ints() -> None:
    with pytest.raises(TypeError, match="takes 8 ints, but 2 arguments came"):
        _C.linear_forward(0, 0)
    with pytest.raises(TypeError):
        _C.linear_forward(*(["0"] * 8))
    assert _C.linear_forward(*([0] * 8)) != 0
