"""The simulated layers equal torch's own on the dequantized weight, and their state is canonical."""

import copy

import pytest
import torch
from bantamweight import QuantizedWeight
from bantamweight.errors import BantamweightError
from bantamweight.nn import SimulatedConv2d, SimulatedLinear
from bantamweight.nn.simulated import simulate_int8
from bantamweight.weights import conv_weight
from torch.nn import functional as F  # noqa: N812


def weight(n: int, k: int, levels: int = 16, group_size: int | None = None) -> QuantizedWeight:
    groups = -(-k // (group_size or k))
    codes = torch.randint(0, levels, (n, k), dtype=torch.uint8)
    scale, zero = torch.rand(n, groups) + 0.1, torch.rand(n, groups) * levels
    return QuantizedWeight.from_codes(codes, scale, zero, group_size=group_size, levels=levels)


def test_linear_is_torchs_on_the_dequantized_weight() -> None:
    linear, w = torch.nn.Linear(37, 8), weight(8, 37, 3, 16)
    layer = SimulatedLinear.from_float(linear, w)
    x = torch.randn(2, 5, 37)
    assert torch.equal(layer(x), F.linear(x, w.dequantize(), linear.bias))
    assert layer.quantized.equals(w)
    corrected = torch.randn(8)
    assert torch.equal(SimulatedLinear.from_float(linear, w, corrected)(x), F.linear(x, w.dequantize(), corrected))


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's note about its own copy
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 0), "dilation": (1, 2)},
        {"kernel_size": 3, "groups": 4, "bias": False},
        {"kernel_size": (2, 3), "padding": "same"},
        {"kernel_size": 3, "padding": "valid"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": (2, 4), "padding": "same", "padding_mode": "circular"},
    ],
)
def test_conv_is_torchs_on_the_dequantized_weight(arguments: dict) -> None:
    conv = torch.nn.Conv2d(8, 12, **arguments)
    kh, kw = conv.kernel_size
    w = weight(12, conv.weight[0].numel())
    layer = SimulatedConv2d.from_float(conv, w)
    with torch.no_grad():
        conv.weight.copy_(conv_weight(w.dequantize(), kh, kw))
    x = torch.randn(2, 8, 9, 10)
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=0)


def test_activations_round_as_the_kernels_do() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0] * 5, [1e-39, 0, 0, 0, 0]])
    rounded = simulate_int8(x, (-1,))
    assert rounded.tolist() == [[127.0, 0.0, 2.0, -2.0, -127.0], [0.0] * 5, [0.0] * 5]
    images = torch.randn(3, 2, 4, 4)
    per_image = torch.cat([simulate_int8(image.reshape(1, -1), (-1,)).view(1, 2, 4, 4) for image in images])
    conv = torch.nn.Conv2d(2, 4, 3)
    layer = SimulatedConv2d.from_float(conv, weight(4, 18), activation_bits=8)
    assert torch.equal(layer(images), F.conv2d(per_image, layer.weight, layer.bias))


def test_gradients_pass_straight_through() -> None:
    layer = SimulatedLinear(weight(4, 6), torch.zeros(4), activation_bits=8)
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 6))
    assert layer.bias is not None and layer.bias.grad is not None


def test_state_dict_round_trip_and_copies() -> None:
    net = torch.nn.Sequential(SimulatedLinear(weight(8, 37, 3, 16), torch.randn(8)), SimulatedLinear(weight(5, 8)))
    other = torch.nn.Sequential(SimulatedLinear(weight(8, 37), torch.randn(8)), SimulatedLinear(weight(5, 8)))
    state = net.state_dict()
    assert sorted(state) == sorted(
        [f"{i}.{name}" for i in (0, 1) for name in ("codes", "scale", "zero", "grid")] + ["0.bias"]
    )
    assert state["0.codes"].shape == (8, 8)  # five trits a byte
    other.load_state_dict(state)
    x = torch.randn(3, 37)
    assert torch.equal(net(x), other(x)) and other[0].quantized.equals(net[0].quantized)
    twin = copy.deepcopy(net)
    twin[0].scale.mul_(2)
    assert torch.equal(net(x), other(x)) and not twin[0].quantized.equals(net[0].quantized)


def test_a_state_dict_that_does_not_fit_names_the_layer() -> None:
    net = torch.nn.Sequential(SimulatedLinear(weight(8, 37)))
    with pytest.raises(RuntimeError, match=r"0: a weight of 8x36 came for a SimulatedLinear of 8x37"):
        net.load_state_dict(torch.nn.Sequential(SimulatedLinear(weight(8, 36))).state_dict())
    state = net.state_dict()
    for name, bad in {
        "scale": torch.full((8, 1), float("nan")),
        "codes": torch.zeros(8, 3, dtype=torch.uint8),
        "grid": torch.tensor([8, 37, 16, 0]),
        "zero": torch.zeros(8, 2),
    }.items():
        with pytest.raises(RuntimeError, match="0: "):
            net.load_state_dict(state | {f"0.{name}": bad})
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.scale"):
        net.load_state_dict({key: value for key, value in state.items() if key != "0.scale"})


def test_half_and_double_keep_the_scales_exact() -> None:
    layer = SimulatedLinear(weight(8, 37), torch.randn(8))
    before = layer.quantized
    for dtype in (torch.float16, torch.float64, torch.bfloat16):
        layer.to(dtype)
        assert layer(torch.randn(2, 37, dtype=dtype)).dtype == dtype
        assert layer.quantized.equals(before)


def test_representation_says_simulated() -> None:
    assert "simulated W4-g128" in repr(SimulatedLinear(weight(4, 256, 16, 128)))
    assert "simulated ternaryA8" in repr(SimulatedLinear(weight(4, 256, 3), activation_bits=8))
    conv = SimulatedConv2d.from_float(torch.nn.Conv2d(2, 4, 3, padding="same"), weight(4, 18, 8))
    assert "kernel_size=(3, 3)" in repr(conv) and "simulated W3" in repr(conv)


def test_refuses_with_a_sentence() -> None:
    with pytest.raises(BantamweightError, match="a weight of 8x36 came for a linear layer of 8x37"):
        SimulatedLinear.from_float(torch.nn.Linear(37, 8), weight(8, 36))
    with pytest.raises(BantamweightError, match="a weight of 6 rows came for a convolution of 4 output channels"):
        SimulatedConv2d.from_float(torch.nn.Conv2d(2, 4, 3), weight(6, 18))
    with pytest.raises(BantamweightError, match="activation_bits is 4"):
        SimulatedLinear(weight(8, 36), activation_bits=4)
    with pytest.raises(BantamweightError, match=r"bias is torch.float32 \[7\], but 8 channels"):
        SimulatedLinear(weight(8, 36), torch.zeros(7))
    with pytest.raises(BantamweightError, match="bias holds NaN"):
        SimulatedLinear(weight(8, 36), torch.full((8,), float("nan")))
    with pytest.raises(BantamweightError, match="padding is 'same' with stride"):
        SimulatedConv2d(weight(4, 18), in_channels=2, kernel_size=(3, 3), stride=(2, 2), padding="same")
