"""The lean second derivatives equal torch's, and are used only where they apply."""

import itertools

import pytest
import torch
from bantamweight import _C
from bantamweight.train import second_derivative
from bantamweight.train.second_derivative import LeanSecondDerivatives
from torch import nn
from torch.nn import functional as F  # noqa: N812


def nodes(tensor):
    """Names of the operations of a graph."""
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [n for n, _ in node.next_functions]
    return {node.name() for node in seen}


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (3, 2, 3, 4), (2, 2, 2, 3, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_has_the_derivatives_of_torch(shape, affine):
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    tensors = [random(*shape)] + ([random(shape[1]), random(shape[1])] if affine else [])
    if affine:
        tensors[1][0] = 0.0  # a dead channel
    dy = random(*shape)
    weights = [random(*t.shape) for t in tensors]  # u, p, q
    for used in itertools.product([True, False], repeat=len(tensors)):
        if not any(used):
            continue
        results = []
        for lean in (False, True):
            x, *rest = [t.clone().requires_grad_() for t in tensors]
            upstream = dy.clone().requires_grad_()
            running = torch.zeros(shape[1], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64)
            with LeanSecondDerivatives() if lean else torch.enable_grad():
                y = F.batch_norm(x, *running, *(rest or [None, None]), training=True, momentum=0.2, eps=1e-3)
            assert ("_BatchNormBackward" in nodes(y)) == lean
            inputs = [x, *rest]
            first = torch.autograd.grad(y, inputs, upstream, create_graph=True)
            value = sum((a * b).sum() for a, b, use in zip(first, weights, used, strict=True) if use)
            wrt = [upstream, *inputs[:2]]
            second = torch.autograd.grad(value, wrt, allow_unused=True)
            second = [torch.zeros_like(t) if g is None else g for g, t in zip(second, wrt, strict=True)]
            results.append([y, *running, *first, *second])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kernel", [name for name, missing in _C.batch_norm_second_variants() if not missing])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_of_floats_is_near_that_of_doubles(kernel, layout, monkeypatch):
    monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", kernel)
    fused, calls = second_derivative._fused_second, []
    monkeypatch.setattr(second_derivative, "_fused_second", lambda *tensors: calls.append(1) or fused(*tensors))
    generator = torch.Generator().manual_seed(0)
    x, dy, u = (torch.randn(6, 5, 7, 9, generator=generator).to(memory_format=layout) for _ in range(3))
    weight, bias, p, q = (torch.randn(5, generator=generator) for _ in range(4))
    results = []
    for dtype in (torch.float64, torch.float32):
        inputs = [t.to(dtype).requires_grad_() for t in (x + 3, weight, bias, dy)]
        with torch.enable_grad() if dtype == torch.float64 else LeanSecondDerivatives():
            y = F.batch_norm(inputs[0], None, None, inputs[1], inputs[2], training=True)
        first = torch.autograd.grad(y, inputs[:3], inputs[3], create_graph=True)
        value = sum((a * b.to(dtype)).sum() for a, b in zip(first, (u, p, q), strict=True))
        results.append(torch.autograd.grad(value, [inputs[3], *inputs[:2]]))
    assert len(calls) == (layout is torch.contiguous_format)
    for wanted, got in zip(*results, strict=True):
        assert (got - wanted).norm() <= 2e-6 * wanted.norm()


@pytest.mark.parametrize("form", [F.relu, torch.relu, torch.Tensor.relu, nn.ReLU(), nn.ReLU(inplace=True)])
def test_relu_has_the_derivatives_of_torch(form):
    generator = torch.Generator().manual_seed(0)
    start, dy, u = (torch.randn(4, 6, dtype=torch.float64, generator=generator) for _ in range(3))
    start[0] = 0.0
    results = []
    for lean in (False, True):
        x, upstream = start.clone().requires_grad_(), dy.clone().requires_grad_()
        with LeanSecondDerivatives() if lean else torch.enable_grad():
            y = form(x * 1.0)
        assert ("_ReLUBackward" in nodes(y)) == (lean and not getattr(form, "inplace", False))
        first = torch.autograd.grad(y.square().sum() + (y * upstream).sum(), x, create_graph=True)[0]
        second = torch.autograd.grad((first * u).sum(), [x, upstream])
        results.append([y, first, *second])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


CONVOLUTIONS = {
    "plain": ((2, 3, 6, 5), (4, 3, 3, 3), {}),
    "strided and padded": ((2, 3, 7, 6), (4, 3, 3, 3), {"stride": 2, "padding": 1}),
    "uneven": ((2, 3, 7, 8), (4, 3, 3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    "grouped": ((2, 4, 6, 6), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((2, 4, 6, 6), (4, 1, 3, 3), {"groups": 4}),
    "one by one": ((2, 3, 4, 4), (5, 3, 1, 1), {"padding": (0,)}),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d_has_the_derivatives_of_torch(case, bias):
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    image, kernel, options = CONVOLUTIONS[case]
    tensors = [random(*image), random(*kernel)] + ([random(kernel[0])] if bias else [])
    dy = random(*F.conv2d(*tensors, **options).shape)
    weights = [random(*t.shape) for t in tensors]  # u, v, q
    for used in itertools.product([True, False], repeat=len(tensors)):
        for image_wanted in (True, False):
            if not any(use and (k or image_wanted) for k, use in enumerate(used)):
                continue
            results = []
            for lean in (False, True):
                inputs = [t.clone().requires_grad_(bool(k) or image_wanted) for k, t in enumerate(tensors)]
                upstream = dy.clone().requires_grad_()
                with LeanSecondDerivatives() if lean else torch.enable_grad():
                    y = F.conv2d(*inputs, **options)
                assert ("_Conv2dBackward" in nodes(y)) == lean
                wanted = [t for t in inputs if t.requires_grad]
                first = torch.autograd.grad(y, wanted, upstream, create_graph=True)
                pairs = list(zip(inputs, weights, used, strict=True))
                chosen = [(w, use) for t, w, use in pairs if t.requires_grad]
                value = sum((a * w).sum() for a, (w, use) in zip(first, chosen, strict=True) if use)
                wrt = [upstream, *wanted]
                second = torch.autograd.grad(value, wrt, allow_unused=True)
                second = [torch.zeros_like(t) if g is None else g for g, t in zip(second, wrt, strict=True)]
                results.append([y, *first, *second])
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_elsewhere_torch_does_the_work():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    layer = nn.BatchNorm2d(3)
    with LeanSecondDerivatives():
        assert "_BatchNormBackward" in nodes(layer(x))
        assert "_BatchNormBackward" not in nodes(layer.eval()(x))
        half = nn.BatchNorm2d(3)(x.bfloat16())
        assert "_BatchNormBackward" not in nodes(half)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            nn.BatchNorm1d(3)(torch.randn(1, 3, requires_grad=True))
        same = nn.Conv2d(3, 2, 3, padding="same")(x)
        one_image = nn.Conv2d(3, 2, 3)(x[0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = nn.Conv2d(3, 2, 3)(x)
        assert all("_Conv2dBackward" not in nodes(y) for y in (same, one_image, cast))
        per_image = torch.func.vmap(nn.Conv2d(3, 2, 3))(x[:, None])
        assert per_image.shape == (4, 1, 2, 3, 3)
    assert "_BatchNormBackward" not in nodes(nn.BatchNorm2d(3)(x))


def test_the_running_statistics_are_those_of_torch():
    x = torch.randn(4, 3, 5, 5)
    plain, lean = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    plain(x)
    with LeanSecondDerivatives():
        lean(x)
    for a, b in zip(plain.buffers(), lean.buffers(), strict=True):
        assert torch.equal(a, b)
