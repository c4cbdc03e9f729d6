"""Transposed convolutions on plain ones, exact for every geometry, with as many weights as torch's."""

import copy
import itertools
from typing import Any

import bantamweight as bw
import pytest
import torch
from bantamweight.nn.prepare import prepare, prepare_like
from torch import nn


def both(module: nn.Module) -> tuple[Any, Any]:
    prepared = copy.deepcopy(module.eval())
    assert set(prepare(prepared).records) == {""}
    weights = sum(conv.weight.numel() for conv in prepared.convs)
    assert weights == module.weight.numel()
    return module, prepared


def same(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@torch.no_grad()
def test_every_padding_of_a_1d_module(kernel: int, stride: int) -> None:
    for padding, extra, groups, bias in itertools.product(range(kernel + 1), range(stride), (1, 2), (False, True)):
        module = nn.ConvTranspose1d(4, 6, kernel, stride, padding, extra, groups, bias)
        reference, prepared = both(module)
        x = torch.randn(2, 4, 9)
        if (9 - 1) * stride - 2 * padding + kernel + extra < 1:
            continue
        same(prepared(x), reference(x))
        same(prepared(x[0]), reference(x[0]))
        same(prepared.weight, reference.weight)


@pytest.mark.parametrize("kernel", [(2, 2), (3, 3), (4, 4), (1, 5), (3, 2), (1, 1)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_geometries_of_a_2d_module(kernel: tuple[int, int], stride: tuple[int, int], groups: int) -> None:
    for padding, bias in itertools.product(((0, 0), (1, 0), (1, 2)), (False, True)):
        more = (stride[0] - 1, 0)
        reference, prepared = both(nn.ConvTranspose2d(4, 6, kernel, stride, padding, more, groups, bias))
        x = torch.randn(2, 4, 5, 7)
        same(prepared(x), reference(x))
        same(prepared(x[0]), reference(x[0]))
        same(prepared.weight, reference.weight)
        assert bias == (prepared.bias is not None)
        if bias:
            same(prepared.bias, reference.bias)
        if stride != (1, 1):
            height, width = (int(size) for size in reference(x).shape[-2:])
            size = [height - more[0] + stride[0] - 1, width + stride[1] - 1]
            same(prepared(x, size), reference(x, size))
            same(prepared(x, output_size=size), reference(x, output_size=size))
        for module in (reference, prepared):
            with pytest.raises(ValueError, match="requested an output size"):
                module(x, [1000, 1000])
            with pytest.raises(RuntimeError):
                module(x[:, :3])


@torch.no_grad()
def test_dilation_with_and_without_stride() -> None:
    for dilation, padding in itertools.product((2, 3, (2, 1)), (0, 2)):
        reference, prepared = both(nn.ConvTranspose2d(4, 6, 3, 1, padding, dilation=dilation))
        x = torch.randn(2, 4, 6, 6)
        same(prepared(x), reference(x))
    reference, prepared = both(nn.ConvTranspose2d(4, 6, 3, (2, 1), dilation=(1, 2), output_padding=(1, 0)))
    same(prepared(x), reference(x))
    left = prepare(nn.ConvTranspose2d(4, 6, 3, 2, dilation=2))
    assert not left.records and "stride (2, 2) and dilation (2, 2)" in left.left[""]


def test_gradients_and_a_fresh_model() -> None:
    reference, prepared = both(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1))
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(reference(x).square().sum(), x)
    (got,) = torch.autograd.grad(prepared(x).square().sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with torch.device("meta"):
        fresh = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1)
    prepare_like(fresh, {"": {"kind": "conv_transpose2d"}})
    fresh.load_state_dict(prepared.state_dict(), assign=True)
    with torch.no_grad():
        same(fresh(x), reference(x))


@torch.no_grad()
def test_a_decoder_quantizes_and_packs() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, 2, 1, 1), nn.ReLU()).eval()
    net.append(nn.ConvTranspose2d(6, 4, 2, 2)).append(nn.ConvTranspose2d(4, 2, 1, 2))
    x = torch.randn(16, 3, 10, 10)
    expected = net(x)
    prepare(net)
    same(net(x), expected)
    small = bw.quantize(net, bw.GPFQ(bits=8), calibration=x, progress=False)
    names = {"0", "2.convs.0", "2.convs.1", "2.convs.2", "2.convs.3", "4.convs.0", "5.convs.0"}
    assert {layer.name for layer in small.quantization.layers} == names
    packed = bw.pack(small)
    assert {record.name for record in packed.packing.layers if record.kernel} == names
    for form in (small, packed):
        assert float((form(x) - expected).norm() / expected.norm()) < 0.05
