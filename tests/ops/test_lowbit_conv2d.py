"""Packed convolutions of every kernel of this machine against exact integers, over all geometries."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from bantamweight import _C, QuantizedWeight
from bantamweight.errors import BantamweightError, KernelError
from bantamweight.ops.lowbit_conv2d import describe_conv2d, lowbit_conv2d, pack_conv2d, run_conv2d, unpack_conv2d
from bantamweight.weights import ConvGeometry, conv_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

DENSE = [name for name, missing in _C.linear_variants() if not missing]
DEPTHWISE = [name for name, missing in _C.depthwise_variants() if not missing]
ISAS = [name for name, missing in _C.isa_table() if not missing]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Torch's double-precision oracle forks for every tiny channel group, which crawls on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A convolution, its weight and its input."""

    weight: QuantizedWeight
    x: Tensor
    bias: Tensor | None
    in_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int

    def pack(self, kernel: str | None = None) -> Tensor:
        return pack_conv2d(
            self.weight,
            in_channels=self.in_channels,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            kernel=kernel,
        )


@st.composite
def cases(draw: st.DrawFn, depthwise: bool = False) -> Case:
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel_size = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(pair)
    if depthwise:
        groups = in_channels = out_channels = draw(st.sampled_from([2, 5, 8, 16, 17, 33]))
    else:
        groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
        in_channels = groups * draw(st.sampled_from([1, 2, 3, 16, 21, 64]))
        out_channels = groups * draw(st.sampled_from([2, 16, 31, 65]))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 3), st.integers(0, 3))))
    stride = (1, 1) if padding == "same" else draw(pair)  # torch has no strided "same"
    height, width = (
        d * (k - 1) + draw(st.integers(1, 9)) for d, k in zip(dilation, kernel_size, strict=True)
    )  # at least the kernel's extent
    columns = kernel_size[0] * kernel_size[1] * (in_channels // groups)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    group_size = draw(st.sampled_from([columns, 4, 7, 32, 128]))
    n_groups = -(-columns // group_size)
    zeros = draw(st.sampled_from(["uniform", "integer", "real"]))
    zero = torch.full((out_channels, n_groups), float(2 ** (bits - 1)))
    if zeros == "integer":
        zero = torch.randint(0, 2**bits, zero.shape, generator=generator).float()
    elif zeros == "real":
        zero = torch.rand(zero.shape, generator=generator) * 2**bits - 0.5
    weight = QuantizedWeight(
        codes=torch.randint(0, 2**bits, (out_channels, columns), dtype=torch.uint8, generator=generator),
        scale=torch.rand(out_channels, n_groups, generator=generator) + 0.1,
        zero=zero,
        levels=2**bits,
        group_size=group_size,
    )
    x = torch.randn(draw(st.integers(0, 2)), in_channels, height, width, generator=generator)
    layout = draw(st.sampled_from(["contiguous", "channels_last", "strided"]))
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = torch.stack([x, x], dim=-1)[..., 0].transpose(-1, -2).contiguous().transpose(-1, -2)
    return Case(
        weight=weight,
        x=x,
        bias=torch.randn(out_channels, generator=generator) if draw(st.booleans()) else None,
        in_channels=in_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """The definition in float64 over the rounded activations, and the sum of the magnitudes it adds up."""
    x, w = case.x, case.weight
    geometry = ConvGeometry(
        in_channels=case.in_channels, kernel_size=case.kernel_size, padding=case.padding, groups=case.groups
    )
    together = geometry.rounded_together(case.weight.out_features)
    maximum = x.abs().amax(together, keepdim=True) if together else torch.full_like(x, 127.0)
    to_code = torch.tensor(127.0) / maximum  # a plain number would be multiplied by the reciprocal
    activations = torch.round(x * to_code).double() if together else x.double()
    group = torch.arange(w.in_features) // w.group_size
    scale, zero, codes = w.scale.double()[:, group], w.zero.double()[:, group], w.codes.double()

    def convolve(x: Tensor, matrix: Tensor) -> Tensor:
        weight = conv_weight(matrix, *case.kernel_size)
        x = x * (maximum / 127.0).double()
        return F.conv2d(x, weight, None, case.stride, case.padding, case.dilation, case.groups)

    bias = torch.zeros(1) if case.bias is None else case.bias.view(1, -1, 1, 1)
    y = convolve(activations, scale * (codes - zero)) + bias.double()
    return y, convolve(activations.abs(), scale * (codes + zero.abs())) + bias.double().abs()


def check_case(case: Case, kernel: str) -> None:
    layout = case.pack(kernel)
    assert describe_conv2d(layout).kernel == kernel
    y, (expected, magnitude) = lowbit_conv2d(case.x, layout, case.bias), exact(case)
    assert y.shape == expected.shape
    assert ((y - expected).abs() <= 1e-6 * magnitude + 1e-30).all()
    reference = lowbit_conv2d(case.x, case.pack("reference"), case.bias)
    assert torch.equal(y, reference)  # every variant rounds alike
    back = unpack_conv2d(layout, case.weight.levels)
    assert torch.equal(back.codes, case.weight.codes)
    assert torch.equal(back.scale, case.weight.scale)
    assert torch.equal(back.zero, case.weight.zero)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel", DENSE)
@given(case=cases())
@settings(max_examples=30, deadline=None)
def test_dense_and_grouped(kernel: str, case: Case) -> None:
    check_case(case, kernel)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel", DEPTHWISE)
@given(case=cases(depthwise=True))
@settings(max_examples=30, deadline=None)
def test_depthwise(kernel: str, case: Case) -> None:
    check_case(case, kernel)


@pytest.mark.parametrize("ceiling", ISAS)
def test_the_environment_sets_the_ceiling(ceiling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", ceiling)
    expected = next(name for name in DENSE if ISAS.index(name) >= ISAS.index(ceiling))
    assert describe_conv2d(plain_case().pack()).kernel == expected


def test_sums_of_the_largest_layers_do_not_wrap() -> None:
    """3x3 over 2048 channels, every weight and activation at the end of its range."""
    columns = 9 * 2048
    weight = QuantizedWeight.from_codes(torch.full((2, columns), 255, dtype=torch.uint8), 1.0, 0.0, levels=256)
    x = torch.full((1, 2048, 3, 3), 127.0)
    for kernel in DENSE:
        y = lowbit_conv2d(x, pack_conv2d(weight, in_channels=2048, kernel_size=(3, 3), kernel=kernel))
        assert y.flatten().tolist() == [columns * 255 * 127.0] * 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_is_reported(bad: float) -> None:
    case = plain_case()
    x = case.x.clone()
    x[1, 2, 3, 4] = bad
    with pytest.raises(KernelError, match="NaN or infinity"):
        lowbit_conv2d(x, case.pack())


def plain_case(dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (24, 9 * 16), dtype=torch.uint8, generator=generator)
    return Case(
        weight=QuantizedWeight.from_codes(codes, 0.05, 8.0, levels=16),
        x=torch.randn(2, 16, 9, 11, generator=generator).to(dtype),
        bias=torch.randn(24, generator=generator),
        in_channels=16,
        kernel_size=(3, 3),
        stride=(2, 1),
        padding=(1, 1),
        dilation=(1, 1),
        groups=1,
    )


def test_the_output_is_channels_last() -> None:
    case = plain_case()
    assert lowbit_conv2d(case.x, case.pack()).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_single_images(dtype: torch.dtype) -> None:
    case = plain_case(dtype)
    layout = case.pack()
    expected = lowbit_conv2d(case.x.float(), layout, case.bias).to(dtype)
    assert torch.equal(lowbit_conv2d(case.x, layout, case.bias), expected)
    assert torch.equal(lowbit_conv2d(case.x[1], layout, case.bias), expected[1])


def test_threads_do_not_change_the_result() -> None:
    case = plain_case()
    x = torch.randn(5, 16, 60, 64)
    layout = case.pack()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = lowbit_conv2d(x, layout, case.bias)
        torch.set_num_threads(3)
        assert torch.equal(lowbit_conv2d(x, layout, case.bias), one)
        assert torch.equal(lowbit_conv2d(x[:1], layout, case.bias), one[:1])
    finally:
        torch.set_num_threads(before)


def op_arguments(case: Case, x: Tensor) -> tuple[object, ...]:
    layout = case.pack()
    found = describe_conv2d(layout)
    geometry = (found.out_channels, found.kernel_size, found.stride, found.padding, found.dilation)
    return (x, layout, case.bias, *geometry)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_torch_op(memory_format: torch.memory_format) -> None:
    case = plain_case()
    arguments = op_arguments(case, case.x.contiguous(memory_format=memory_format))
    torch.library.opcheck(torch.ops.bantamweight.lowbit_conv2d.default, arguments)
    y = torch.ops.bantamweight.lowbit_conv2d(*arguments)
    assert torch.equal(y, lowbit_conv2d(case.x, case.pack(), case.bias))


def test_a_misaligned_layout_is_moved() -> None:
    case = plain_case()
    x, layout, *rest = op_arguments(case, case.x)
    assert isinstance(layout, Tensor)
    shifted = torch.empty(layout.numel() + 1, dtype=torch.uint8)[1:].copy_(layout)
    y = torch.ops.bantamweight.lowbit_conv2d(x, shifted, *rest)
    assert torch.equal(y, run_conv2d(case.x, layout, case.bias, describe_conv2d(layout)))


def test_bad_input_is_a_sentence() -> None:
    case = plain_case()
    layout = case.pack()
    with pytest.raises(BantamweightError, match=r"takes inputs \[n, 16, h, w\], but \[2, 5, 9, 11\]"):
        lowbit_conv2d(torch.randn(2, 5, 9, 11), layout)
    with pytest.raises(BantamweightError, match="takes float32"):
        lowbit_conv2d(torch.zeros(2, 16, 9, 11, dtype=torch.int32), layout)
    with pytest.raises(BantamweightError, match="at least 1x1"):
        lowbit_conv2d(torch.randn(2, 16, 0, 11), layout)
    with pytest.raises(BantamweightError, match=r"bias is torch.float32 \[3\]"):
        lowbit_conv2d(case.x, layout, torch.zeros(3))
    with pytest.raises(BantamweightError, match="which has 288 columns"):
        pack_conv2d(case.weight, in_channels=32, kernel_size=(3, 3))
    with pytest.raises(BantamweightError, match="groups is 5"):
        pack_conv2d(case.weight, in_channels=16, kernel_size=(3, 3), groups=5)
    with pytest.raises(BantamweightError, match="padding is 'reflect'"):
        pack_conv2d(case.weight, in_channels=16, kernel_size=(3, 3), padding="reflect")
    with pytest.raises(KernelError, match=r"stride \(0, 1\)"):
        pack_conv2d(case.weight, in_channels=16, kernel_size=(3, 3), stride=(0, 1))
    with pytest.raises(KernelError, match="names no kernel"):
        pack_conv2d(case.weight, in_channels=16, kernel_size=(3, 3), kernel="sse2")
    damaged = layout.clone()
    damaged[0] ^= 1
    with pytest.raises(KernelError, match="packed weights"):
        lowbit_conv2d(case.x, damaged)
