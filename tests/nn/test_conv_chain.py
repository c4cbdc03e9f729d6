"""Chains of packed convolutions against the single layers they are made of."""

import copy
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bantamweight as bw
import numpy as np
import pytest
import torch
from bantamweight.errors import BantamweightError, CalibrationError
from bantamweight.nn import PackedConv2d, fuse
from bantamweight.nn.conv_fusion import convolution_chains
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Residual(nn.Module):
    """Every pattern that a chain takes: both orders of a sum, a shortcut convolution, a parameter-free one, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 16, 7, 2, 3), nn.MaxPool2d(3, 2, 1)
        self.reduce, self.middle = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.expand, self.shortcut = nn.Conv2d(8, 24, 1), nn.Conv2d(16, 24, 1, 2)
        self.grouped, self.depthwise = nn.Conv2d(24, 32, 3, 2, 1, groups=2), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.relu, self.dropout = nn.ReLU(), nn.Dropout(0.5)
        self.average, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.stem(x)))
        y = self.expand(F.relu(self.middle(torch.relu(self.reduce(x)))))
        x = self.relu(y + self.shortcut(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 5))
        x = (shortcut + self.grouped(x)).relu()
        x = torch.add(self.relu(self.depthwise(x)), x)  # the ReLU comes before the sum
        return self.head(self.flatten(self.average(self.dropout(x))))


def packed(net: nn.Module, x: Tensor, scheme: str = "W4") -> nn.Module:
    return bw.pack(bw.quantize(net.eval(), bw.RoundToNearest(bits=int(scheme[1:])), calibration=x, progress=False))


@pytest.fixture(scope="module")
def residual() -> nn.Module:
    torch.manual_seed(0)
    return packed(Residual(), torch.randn(4, 3, 40, 32))


KERNELS = [name for name, missing in bw._C.linear_variants() if not missing]


@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_layers(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", kernel)
    torch.manual_seed(1)
    model = packed(Residual(), torch.randn(4, 3, 40, 32))
    assert isinstance(model.stem, PackedConv2d) and model.stem.kernel == kernel
    fused = fuse(model)
    names = fused.fusion.names  # type: ignore[union-attr]
    assert names == ["stem", "reduce", "middle", "expand", "shortcut", "grouped", "depthwise"]
    assert len(convolution_chains(fused)) == 1
    for images in (1, 2, 3, 7):
        for size in ((40, 32), (33, 51)):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(images, 3, *size).contiguous(memory_format=memory_format)
                chain: Any = fused.conv_chain_0
                alone = chain._run_layers(x)  # the average differs by float rounding, all else is equal
                assert torch.allclose(chain(x), alone, rtol=1e-6, atol=1e-6 * float(alone.abs().max()))
                assert torch.allclose(fused(x), model(x), rtol=0, atol=2e-2 * float(model(x).abs().max()))


def test_feature_maps_are_equal_to_the_last_bit() -> None:
    torch.manual_seed(2)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(n, 20, 3, padding=1) for n in (5, 20, 20))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x), inplace=True)
            return F.max_pool2d(F.relu(self.third(F.relu(self.second(x))) + x), 2)

    x = torch.randn(5, 5, 11, 14)
    model = packed(Block(), x)
    fused = fuse(model)
    names = fused.fusion.names  # type: ignore[union-attr]
    assert names == ["first", "second", "third"]
    y = fused(x)
    assert torch.equal(y, model(x))
    assert y.is_contiguous() and fused(x.to(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_batches(residual: nn.Module, threads: int) -> None:
    fused = fuse(residual)
    before = torch.get_num_threads()
    x = torch.randn(8, 3, 40, 32)
    one_by_one = torch.cat([fused(image) for image in x.split(1)])
    torch.set_num_threads(threads)
    try:
        for images in range(1, 9):
            # Rounding images together or alone is the same; so are sums shared out otherwise.
            assert torch.allclose(fused(x[:images]), one_by_one[:images], rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def sequential(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), ["0"]),
        (sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3)), []),  # no two steps in a row
        (sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)), ["2", "4"]),
        (sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), []),
        (sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, ceil_mode=True)), []),
        (sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, dilation=2)), []),
        (sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2)), []),
        (sequential(nn.ReLU(), nn.Linear(20, 4)), []),
    ],
)
def test_what_is_fused(build: Callable[[], nn.Module], names: list[str]) -> None:
    torch.manual_seed(3)
    x = torch.randn(3, 3, 20, 20)
    model = packed(build(), x)
    fused = fuse(model)
    assert fused.fusion.names == names  # type: ignore[union-attr]
    assert len(convolution_chains(fused)) == bool(names)
    assert names or "no chain of packed convolutions" in str(fused.fusion)
    assert torch.equal(fused(x), model(x))


class TwoOutputs(nn.Module):
    """A feature map that is read outside as well ends the chain there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.second(self.first(x).relu())
        return y, self.third(y).relu()


def test_a_value_that_leaves_cuts_the_chain() -> None:
    torch.manual_seed(4)
    x = torch.randn(2, 3, 12, 12)
    model = packed(TwoOutputs(), x)
    fused = fuse(model)
    names = fused.fusion.names  # type: ignore[union-attr]
    assert names == ["first", "second", "third"]
    assert len(convolution_chains(fused)) == 2
    for ours, theirs in zip(fused(x), model(x), strict=True):
        assert torch.equal(ours, theirs)


def test_other_inputs_and_copies(residual: nn.Module) -> None:
    fused = fuse(residual)
    x = torch.randn(2, 3, 40, 32)
    chain: Any = fused.conv_chain_0
    y = chain(x)
    assert torch.equal(copy.deepcopy(fused).conv_chain_0(x), y)  # type: ignore[operator]
    half = chain(x.bfloat16())
    assert half.dtype is torch.bfloat16 and torch.allclose(half.float(), y, rtol=0.1, atol=0.1 * float(y.abs().max()))
    assert chain(x[:0]).shape == (0, *y.shape[1:])
    scattered = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(chain(scattered), y)


def test_refusals(residual: nn.Module) -> None:
    fused = fuse(residual)
    chain: Any = fused.conv_chain_0
    with pytest.raises(BantamweightError, match="takes inputs"):
        chain(torch.randn(1, 4, 40, 32))
    with pytest.raises(BantamweightError, match="NaN or infinity"):
        chain(torch.full((1, 3, 40, 32), float("nan")))
    with pytest.raises(BantamweightError, match="gradient"):
        chain(torch.randn(1, 3, 40, 32, requires_grad=True))


def test_what_cannot_be_traced_stays() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).relu() if float(x.sum()) > 0 else self.conv(x)

    x = torch.rand(2, 3, 8, 8)
    model = packed(Branching(), x)
    fused = fuse(model)
    assert str(fused.fusion).startswith("the model: Branching as it was, torch.fx cannot trace its forward (TypeError")
    assert torch.equal(fused(x), model(x))
    with pytest.raises(BantamweightError, match=r"this Branching has no chain .* cannot trace"):
        fuse(model, calibration=x)


def in_codes(chain: Any, x: Tensor) -> Tensor:
    """What int8 maps make of a chain: every value rounded to its codes, everything else in doubles."""
    most = x.abs().amax((1, 2, 3), keepdim=True).double()
    values: dict[Any, Tensor] = {None: (x.double() * (127 / most)).round() * (most / 127)}
    y = x
    for step in chain._steps:
        y = values[step.input]
        if step.conv is not None:
            conv = step.conv
            bias = None if conv.bias is None else conv.bias.double()
            weight = conv.quantized.dequantize().double().view(conv.out_channels, *conv.kernel_size, -1)
            y = F.conv2d(y, weight.permute(0, 3, 1, 2), bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        elif step.kind == "max_pool":
            y = F.max_pool2d(y, step.kernel_size, step.stride, step.padding)
        elif step.kind == "average":
            y = y.mean((2, 3), keepdim=True)
        elif step.kind == "subsample":
            y = F.pad(y[:, :, :: step.stride[0], :: step.stride[1]], (0, 0, 0, 0, *step.channels))
        if step.residual is not None:
            y = y + values[step.residual]
        y = y.relu() if step.relu else y
        if (maps := chain._ranges.get(step)) is not None:
            y = maps.scale * ((y / maps.scale + maps.zero).round().clamp(-127, 127) - maps.zero)
        values[step] = y
    return y


@pytest.mark.parametrize("kernel", KERNELS)
def test_int8_maps(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", kernel)
    torch.manual_seed(5)
    x = torch.randn(9, 3, 40, 32)
    model = packed(Residual(), x)
    fused, dynamic = fuse(model, calibration=[x[:4], x[4:]]), fuse(model)
    chain: Any = fused.conv_chain_0
    assert chain.has_int8_maps and not dynamic.conv_chain_0.has_int8_maps  # type: ignore[union-attr]
    assert "int8 maps" in repr(chain)
    for images in (1, 2, 9):
        for size in ((40, 32), (33, 51)):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(images, 3, *size).contiguous(memory_format=memory_format)
                expected = in_codes(chain, x).float().flatten(1)
                # Where a sum lies between two codes, float and double may round to different ones.
                assert float((chain(x) - expected).norm()) <= 3e-3 * float(expected.norm())
                assert float((fused(x) - dynamic(x)).norm()) <= 0.1 * float(dynamic(x).norm())


class Shared(nn.Module):
    """A shortcut by another name: what becomes of it must not change the value itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(n, 6, 3, padding=1) for n in (3, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        same = F.pad(x[:, :, ::1, ::1], (0, 0, 0, 0, 0, 0))
        y = self.second(x) + same
        y = self.third(y) + y[:, :, ::1, ::1]
        return y + torch.relu(y[:, :, ::1, ::1])


def test_other_names_of_a_value() -> None:
    torch.manual_seed(8)
    x = torch.randn(2, 3, 9, 9)
    model = packed(Shared(), x)
    assert torch.equal(fuse(model)(x), model(x))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(n, 6, 3, padding=1) for n in (3, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return (self.second(x) + F.pad(x[:, :, ::1, ::1], (0, 0, 0, 0, 0, 0))).relu()

    model = packed(Block(), x)
    fused: Any = fuse(model)
    assert [step.kind for step in fused.conv_chain_0._steps] == ["conv", "conv"]
    assert torch.equal(fused(x), model(x))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_int8_maps_do_not_depend_on_threads_and_batches(residual: nn.Module, threads: int) -> None:
    x = torch.randn(40, 3, 33, 32)
    fused = fuse(residual, calibration=x)
    before = torch.get_num_threads()
    one_by_one = torch.cat([fused(image) for image in x.split(1)])
    torch.set_num_threads(threads)
    try:
        for images in (1, 2, 3, 7, 16, 17, 40):
            assert torch.allclose(fused(x[:images]), one_by_one[:images], rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_int8_maps_of_other_inputs_and_copies(residual: nn.Module) -> None:
    x = torch.randn(4, 3, 40, 32)
    fused = fuse(residual, calibration=x)
    y = fused(x)
    assert torch.equal(copy.deepcopy(fused)(x), y)
    chain: Any = fused.conv_chain_0
    half = chain(x.bfloat16())
    assert half.dtype is torch.bfloat16 and torch.equal(half, chain(x.bfloat16().float()).bfloat16())
    assert fused(x[:0]).shape == (0, 5)
    assert torch.isfinite(fused(1e6 * x)).all()  # beyond the ranges: cut off
    with pytest.raises(BantamweightError, match="NaN or infinity"):
        fused(torch.full((1, 3, 40, 32), float("inf")))


def test_maps_of_zeros_and_of_one_sign() -> None:
    torch.manual_seed(6)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 3, 1))
    x = torch.rand(3, 2, 9, 9)
    with torch.no_grad():
        net[0].bias.fill_(-100)  # type: ignore[union-attr]
        net[2].bias.fill_(-3)  # type: ignore[union-attr]
    model = packed(net, x)
    fused: Any = fuse(model, calibration=x)
    zeros, negative = fused.conv_chain_0._ranges.values()
    assert (zeros.scale, zeros.zero) == (1.0, -127)
    assert negative.zero == 127
    assert torch.allclose(fused(x), model(x), atol=0.02 * float(model(x).abs().max()))


@pytest.mark.parametrize(
    ("calibration", "sentence"),
    [
        (torch.zeros(0, 3, 40, 32), "empty"),
        ([], "empty"),
        (torch.randn(2, 4, 40, 32), "takes inputs"),
        (torch.full((2, 3, 40, 32), float("nan")), "NaN or infinity"),
        ("images", "must be a tensor"),
    ],
)
def test_bad_calibration_data(residual: nn.Module, calibration: Any, sentence: str) -> None:
    with pytest.raises(BantamweightError, match=sentence):
        fuse(residual, calibration=calibration)


def test_calibration_that_reaches_no_chain() -> None:
    torch.manual_seed(7)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model = bw.pack(bw.quantize(layer, "W4", calibration=torch.randn(2, 3, 16), progress=False))
    with pytest.raises(BantamweightError, match="no chain of them"):
        fuse(model, calibration=torch.randn(2, 3, 16))

    chain: Any = fuse(packed(Residual(), torch.randn(2, 3, 40, 32))).conv_chain_0
    chain.observe(True)
    with pytest.raises(CalibrationError, match="never reaches"):
        chain.use_int8_maps()


DATA = os.environ.get("BANTAMWEIGHT_DATA")


@pytest.mark.data
@pytest.mark.skipif(not DATA, reason="BANTAMWEIGHT_DATA is not set")
@pytest.mark.parametrize("depth", [20, 56])
@torch.no_grad()
def test_int8_maps_keep_the_accuracy_of_real_networks(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10 ResNets at 4 bits, on 5,000 test images: within 0.3 points of the scales that layers find themselves.

    The images are JPEG files again, which costs ten points of accuracy, but there are enough of them.
    """
    pillow = pytest.importorskip("PIL.Image")
    folder = Path(str(DATA))
    monkeypatch.syspath_prepend(str(folder))
    from models import CifarResNet, load  # type: ignore[import-not-found]

    data = np.load(folder / "cifar10.npz")
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (CifarResNet.MEAN, CifarResNet.STD))

    def prepare(images: np.ndarray) -> Tensor:
        return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std

    files = np.load(folder / "cifar10_test_jpeg.npz")
    jpeg, offsets, labels = files["jpg"], files["off"], torch.from_numpy(files["y"][::2]).long()
    decoded = [
        np.asarray(pillow.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB"))
        for i in range(0, len(files["y"]), 2)
    ]
    calibration, images = prepare(data["x_train"][:200]), prepare(np.stack(decoded))
    network = load(CifarResNet(depth), str(folder / f"cifar10_resnet{depth}.safetensors"))
    model = bw.pack(bw.quantize(network, bw.RoundToNearest(bits=4), calibration=calibration, progress=False))

    def accuracy(model: nn.Module) -> float:
        predicted = torch.cat([model(part).argmax(1) for part in images.split(100)])
        return 100 * float((predicted == labels).float().mean())

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small gain nothing from a second thread, and lose much on a busy machine
    try:
        static, dynamic = accuracy(fuse(model, calibration=calibration)), accuracy(fuse(model))
    finally:
        torch.set_num_threads(before)
    assert abs(static - dynamic) <= 0.3
