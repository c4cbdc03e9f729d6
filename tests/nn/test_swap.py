"""pack and unpack: every layer's form, by name; models that read a layer's weight keep working."""

import pytest
import torch
from bantamweight import QuantizedWeight, load, pack, pack_, save
from bantamweight.errors import BantamweightError
from bantamweight.nn import PackedConv2d, PackedLinear, SimulatedConv2d, SimulatedLinear, fuse, unpack
from bantamweight.weights import conv_matrix


def simulated(layer: torch.nn.Linear | torch.nn.Conv2d, **arguments: int) -> torch.nn.Module:
    """The layer rounded to nearest at four bits."""
    matrix = layer.weight.detach() if layer.weight.ndim == 2 else conv_matrix(layer.weight.detach())
    scale = matrix.abs().amax(1, keepdim=True) / 7
    codes = (torch.round(matrix / scale) + 8).to(torch.uint8)
    w = QuantizedWeight.from_codes(codes, scale, 8.0, levels=16)
    kind = SimulatedLinear if isinstance(layer, torch.nn.Linear) else SimulatedConv2d
    return kind.from_float(layer, w, activation_bits=8, **arguments)  # type: ignore[arg-type]


@torch.no_grad()
def test_pack_is_a_copy_and_unpack_its_inverse() -> None:
    net = torch.nn.Sequential(
        simulated(torch.nn.Conv2d(3, 8, 3)), torch.nn.ReLU(), torch.nn.Flatten(), simulated(torch.nn.Linear(72, 5))
    ).eval()
    packed = pack(net)
    assert isinstance(net[0], SimulatedConv2d) and isinstance(net[3], SimulatedLinear)
    assert isinstance(packed[0], PackedConv2d) and isinstance(packed[3], PackedLinear)
    assert not packed[0].training
    assert [(r.name, r.scheme, r.reason) for r in packed.packing.layers] == [("0", "W4", None), ("3", "W4", None)]
    assert str(packed.packing) == f"0: W4 {packed[0].kernel}\n3: W4 {packed[3].kernel}"
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(packed(x), net(x), rtol=1e-5, atol=1e-5)
    back = unpack(packed)
    assert back[0].quantized.equals(net[0].quantized) and back[3].quantized.equals(net[3].quantized)
    assert not hasattr(back, "packing") and isinstance(packed[0], PackedConv2d)
    assert torch.equal(pack(back)(x), packed(x))


def test_a_packed_model_runs_outside_no_grad() -> None:
    net = torch.nn.Sequential(torch.nn.LayerNorm(6), simulated(torch.nn.Linear(6, 4)), torch.nn.Linear(4, 2))
    packed = pack(net)
    assert not packed(torch.randn(3, 6)).requires_grad and net[0].weight.requires_grad
    assert unpack(packed)(torch.randn(3, 6)).requires_grad
    with pytest.raises(BantamweightError, match="requires a gradient; call it under"):
        packed(torch.randn(3, 6, requires_grad=True))


def test_a_layer_used_twice_stays_one_layer() -> None:
    layer = simulated(torch.nn.Linear(6, 6))
    packed = pack_(torch.nn.Sequential(layer, torch.nn.ReLU(), layer))
    assert packed[0] is packed[2] and len(packed.packing.layers) == 1


def test_a_model_that_is_one_layer() -> None:
    packed = pack(simulated(torch.nn.Linear(6, 4)))
    assert isinstance(packed, PackedLinear) and packed.packing.layers[0].name == ""
    assert isinstance(unpack(packed), SimulatedLinear)
    layer = simulated(torch.nn.Linear(6, 4))
    assert pack_(layer) is layer and isinstance(layer, PackedLinear)


class HeldElsewhere(torch.nn.Module):
    """Its layers hang in a list, a dict, a second attribute and a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = simulated(torch.nn.Linear(6, 6)), simulated(torch.nn.Conv2d(1, 2, 3, padding=1))
        self.again, self.steps, self.by_name = self.first, [self.first], {"conv": self.conv}
        first = self.first
        self.last = lambda x: first(x)
        self.first.scale_of_user = 3  # type: ignore[assignment]
        self.seen: list[str] = []
        self.first.register_forward_hook(lambda module, inputs, y: self.seen.append(type(module).__name__))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = step(x)
        return self.by_name["conv"](self.last(self.again(x))[:, None, None])


@torch.no_grad()
def test_layers_change_where_they_are() -> None:
    net, x = HeldElsewhere().eval(), torch.randn(3, 6)
    expected, layer = net(x), net.first
    pack_(net)
    assert net.first is layer is net.again is net.steps[0] and isinstance(layer, PackedLinear)
    assert isinstance(net.by_name["conv"], PackedConv2d) and len(net.packing.layers) == 2  # type: ignore[arg-type]
    assert layer.scale_of_user == 3
    net.seen.clear()
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    assert net.seen == ["PackedLinear"] * 3
    again = pack_(net, activations="int16")
    assert again.first is layer and layer.activations == "int16" and net.packing.layers[0].kernel is not None


def test_nothing_of_the_other_form_stays_on_a_layer() -> None:
    for float_layer in (torch.nn.Linear(6, 4), torch.nn.Conv2d(2, 4, 3)):
        layer = simulated(float_layer)
        net = torch.nn.Sequential(layer)
        packed = pack(net)
        lone = pack(simulated(float_layer))
        assert set(vars(packed[0])) == set(vars(lone)) - {"packing"}
        assert packed[0].activation_bits == 8
        back = unpack(packed)
        assert set(vars(back[0])) == set(vars(simulated(float_layer)))
        assert set(packed.state_dict()) == set(back.state_dict()) == set(net.state_dict())
    w = simulated(torch.nn.Linear(6, 4)).quantized
    assert pack(torch.nn.Sequential(SimulatedLinear(w, activation_bits=None)))[0].activation_bits == 8


def test_parametrized_layers_stay_simulated() -> None:
    class Twice(torch.nn.Module):
        def forward(self, bias: torch.Tensor) -> torch.Tensor:
            return 2 * bias

    net = torch.nn.Sequential(simulated(torch.nn.Linear(6, 4)), simulated(torch.nn.Linear(4, 2)))
    torch.nn.utils.parametrize.register_parametrization(net[0], "bias", Twice())
    packed = pack_(net)
    assert [record.kernel is None for record in packed.packing.layers] == [True, False]
    assert packed.packing.layers[0].reason == "torch.nn.utils.parametrize changes its tensors"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_forms_keep_the_dtype(dtype: torch.dtype) -> None:
    net = torch.nn.Sequential(simulated(torch.nn.Linear(6, 6)), torch.nn.LayerNorm(6)).to(dtype)
    packed = pack(net)
    assert packed[0].weight.dtype == unpack(packed)[0].weight.dtype == dtype
    x = torch.randn(3, 6, dtype=dtype)
    assert packed(x).dtype == unpack(packed)(x).dtype == dtype


def test_a_layer_no_kernel_takes_stays_simulated_and_says_why() -> None:
    w = QuantizedWeight.from_codes(torch.zeros(2, 70000, dtype=torch.uint8), 1.0, 0.0, group_size=68000, levels=16)
    packed = pack(torch.nn.Sequential(SimulatedLinear(w), simulated(torch.nn.Linear(2, 2))))
    stayed, changed = packed.packing.layers
    assert stayed.kernel is None and "no kernel takes a 2x70000 weight" in stayed.reason
    assert isinstance(packed[0], SimulatedLinear) and changed.kernel is not None
    assert "simulated, no kernel takes" in str(packed.packing)


def test_nothing_to_pack_is_an_error() -> None:
    with pytest.raises(BantamweightError, match="Sequential has no quantized layer to pack; call quantize first"):
        pack(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@torch.no_grad()
def test_torchs_transformer_runs_packed() -> None:
    torch.manual_seed(0)  # a sum that lies between two int8 values may be rounded either way
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    net = torch.nn.TransformerEncoder(layer, 2).eval()
    for block in net.layers:
        block.linear1, block.linear2 = simulated(block.linear1), simulated(block.linear2)
        block.self_attn.out_proj = simulated(block.self_attn.out_proj)
    packed = pack(net)
    reasons = {record.name: record.reason for record in packed.packing.layers}
    assert reasons["layers.0.linear1"] is None
    assert reasons["layers.1.self_attn.out_proj"] == "the module above it reads its float weight"
    x = torch.randn(2, 5, 32)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    for block in net.layers:  # the float fast path would skip the rounding of the activations
        block.activation_relu_or_gelu = 0
    torch.testing.assert_close(packed(x), net(x), rtol=1e-4, atol=1e-4)
    net.use_nested_tensor = False
    expected = net(x, src_key_padding_mask=mask)
    torch.testing.assert_close(packed(x, src_key_padding_mask=mask), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_activations_for_all_layers_or_some(tmp_path) -> None:
    def make() -> torch.nn.Module:
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(72, 64), torch.nn.Linear(64, 5)
        ).eval()

    net = make()
    for index in (0, 2, 3):
        net[index] = simulated(net[index])
    assert [layer.activations for layer in pack(net)[2:]] == ["int8", "int8"]
    everywhere = pack(net, activations="int16")
    assert everywhere[0].activations == "int8" and [x.activations for x in everywhere[2:]] == ["int16", "int16"]
    some = pack(net, activations={"2": "int8-block", r"\d": "int16"})  # the first that fits
    assert [layer.activations for layer in some[2:]] == ["int8-block", "int16"]
    x = torch.randn(2, 3, 5, 5)
    back = unpack(some)
    assert [layer.activations for layer in back[2:]] == ["int8-block", "int16"]
    assert torch.equal(pack(back)(x), some(x)) and torch.equal(pack(some, activations="int8")(x), pack(net)(x))
    save(some, tmp_path / "some.safetensors")
    again = load(tmp_path / "some.safetensors", make())
    assert [layer.activations for layer in again[2:]] == ["int8-block", "int16"] and torch.equal(again(x), some(x))
    save(pack(net), tmp_path / "plain.safetensors")
    assert b'"activations"' not in (tmp_path / "plain.safetensors").read_bytes()  # as files were before there was it
    with pytest.raises(BantamweightError, match="activations is 'float', but must be one of"):
        pack(net, activations="float")
    with pytest.raises(BantamweightError, match="names '0', which fits no quantized linear layer; they are 2, 3"):
        pack(net, activations={"0": "int16"})
    with pytest.raises(BantamweightError, match="neither a layer's name nor a regular expression"):
        pack(net, activations={"(": "int16"})


@torch.no_grad()
def test_a_fused_model_is_packed_already() -> None:
    net = torch.nn.Sequential(simulated(torch.nn.Conv2d(3, 8, 3)), torch.nn.ReLU(), simulated(torch.nn.Conv2d(8, 4, 3)))
    fused = fuse(pack(net.eval()))
    assert fused.fusion.names == ["0", "2"]
    with pytest.raises(BantamweightError, match="this Sequential is fused and packed already"):
        pack(fused)
