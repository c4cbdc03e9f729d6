"""What kernels read by address is checked however it is set, and a packed layer answers what models read of torch's."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bantamweight import QuantizedWeight
from bantamweight.errors import BantamweightError, KernelError
from bantamweight.nn import PackedConv2d, PackedEmbedding, PackedLinear, SimulatedConv2d, SimulatedLinear, unpack
from bantamweight.nn.fold import LayerTracer
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrize import register_parametrization

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
INDEX = torch.tensor([[1, 2], [8, 0]])


def weight(n: int, k: int) -> QuantizedWeight:
    return QuantizedWeight.from_codes(torch.randint(0, 16, (n, k), dtype=torch.uint8), 0.1, 8.0, levels=16)


def linear() -> PackedLinear:
    return PackedLinear(weight(8, 32), torch.randn(8))


def conv(**arguments: Any) -> PackedConv2d:
    groups = arguments.get("groups", 1)
    w = weight(8, 9 * 4 // groups)
    return PackedConv2d.from_quantized(w, torch.randn(8), in_channels=4, kernel_size=3, padding=1, **arguments)


def assert_runs_with(layer: PackedLinear | PackedConv2d, bias: torch.Tensor, x: torch.Tensor) -> None:
    """The bias is what both the kernel adds and the layer shows, in the form that the kernel reads."""
    shape = (-1,) if isinstance(layer, PackedLinear) else (-1, 1, 1)
    without = copy.deepcopy(layer)
    without.bias = None
    torch.testing.assert_close(layer(x), without(x) + bias.detach().float().view(shape), rtol=0, atol=1e-5)
    assert layer.bias is not None and torch.equal(layer.bias, bias.detach().float())
    assert layer.bias.dtype == torch.float32 and layer.bias.is_contiguous() and not layer.bias.requires_grad
    assert "bias" in layer._buffers and dict(layer.named_parameters()).keys() == {"like"}


BIASES: dict[str, Callable[[], torch.Tensor]] = {
    "plain": lambda: torch.randn(8),
    "half": lambda: torch.randn(8).half(),
    "double": lambda: torch.randn(8).double(),
    "strided": lambda: torch.randn(16)[::2],
    "expanded": lambda: torch.randn(1).expand(8),
    "parameter": lambda: nn.Parameter(torch.randn(8)),
    "with gradient": lambda: torch.randn(8, requires_grad=True),
    "negated": lambda: torch._neg_view(torch.randn(8)),
    "imaginary": lambda: torch.randn(8, dtype=torch.complex64).conj().imag,
}


def by_attribute(layer: Any, bias: torch.Tensor) -> None:
    layer.bias = bias


def by_data(layer: Any, bias: torch.Tensor) -> None:
    layer.bias.data = bias.detach()


def by_buffers(layer: Any, bias: torch.Tensor) -> None:
    layer._buffers["bias"] = bias


def by_state_dict(layer: Any, bias: torch.Tensor) -> None:
    layer.load_state_dict(layer.state_dict() | {"bias": bias})


def by_assigned_state_dict(layer: Any, bias: torch.Tensor) -> None:
    layer.load_state_dict(layer.state_dict() | {"bias": bias}, assign=True)


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("put", [by_attribute, by_data, by_buffers, by_state_dict, by_assigned_state_dict])
@torch.no_grad()
def test_a_bias_of_any_form_set_in_any_way(kind: str, put: Callable[[Any, torch.Tensor], None]) -> None:
    for layer, x in ((linear(), X), (conv(), torch.randn(2, 4, 5, 5))):
        layer(x)
        bias = BIASES[kind]()
        put(layer, bias)
        assert_runs_with(layer, bias, x)
        layer.bias.add_(1)  # type: ignore[union-attr]
        assert_runs_with(layer, layer.bias.clone(), x)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("bias", "says"),
    [
        (torch.zeros(7), r"bias is torch.float32 \[7\], but 8 channels need a float tensor \[8\] or None"),
        (torch.zeros(8, 1), r"bias is torch.float32 \[8, 1\]"),
        (torch.zeros(8, dtype=torch.int64), r"bias is torch.int64 \[8\]"),
        (torch.zeros(8, dtype=torch.complex64), r"bias is torch.complex64 \[8\]"),
        (torch.zeros(8, device="meta"), r"bias is torch.float32 \[8\] on meta"),
        (torch.zeros(8).to_sparse(), r"bias is torch.sparse_coo torch.float32 \[8\]"),
        (torch.full((8,), float("nan")), "bias holds NaN or infinity"),
        ([0.0] * 8, "bias is a list"),
    ],
)
@torch.no_grad()
def test_a_bias_that_does_not_fit_is_refused_and_the_old_one_stays(bias: Any, says: str) -> None:
    layer = linear()
    before = layer(X)
    with pytest.raises(BantamweightError, match=says):
        layer.bias = bias
    assert torch.equal(layer(X), before)
    layer._buffers["bias"] = bias if isinstance(bias, torch.Tensor) else torch.zeros(9)
    with pytest.raises((BantamweightError, RuntimeError), match=r"bias |doesn't have storage"):
        layer(X)


@torch.no_grad()
def test_memory_that_moves_or_goes_under_a_layer() -> None:
    def moved(layer: Any) -> None:
        layer.bias.set_(torch.randn(8))

    def shared(layer: Any) -> None:
        layer.bias.share_memory_()
        layer.layout.share_memory_()

    def swapped(layer: Any) -> None:
        torch.utils.swap_tensors(layer.bias, torch.randn(8))

    for change in (moved, shared, swapped):
        layer = linear()
        change(layer)
        assert_runs_with(layer, layer.bias.clone(), X)  # type: ignore[union-attr]
    for resize in (lambda layer: layer.bias.resize_(100_000), lambda layer: layer.bias.untyped_storage().resize_(0)):
        layer = linear()
        resize(layer)
        with pytest.raises(BantamweightError, match=r"bias is torch.float32 \[100000\]|the memory of bias of PackedL"):
            layer(X)
    layer = linear()
    layer.layout.untyped_storage().resize_(0)
    with pytest.raises(BantamweightError, match="the memory of layout of PackedLinear 8x32 was taken away"):
        layer(X)
    table = PackedEmbedding(weight(9, 16))
    expected = table(INDEX)
    table.layout.data = table.layout.clone()
    assert torch.equal(table(INDEX), expected)
    table.layout.data = torch.zeros_like(table.layout)
    with pytest.raises(KernelError, match="made by another version"):
        table(INDEX)


@torch.no_grad()
def test_a_layout_must_be_the_layers_own() -> None:
    layer, other = linear(), linear()
    layer.layout = other.layout
    assert layer.quantized.equals(other.quantized)
    unaligned = torch.cat([torch.zeros(1, dtype=torch.uint8), layer.layout])[1:]
    layer.layout = unaligned
    assert layer.layout.data_ptr() % 64 == 0 and layer.quantized.equals(other.quantized)
    for layout, says in (
        (
            PackedLinear(weight(9, 32)).layout,
            "a layout of 9x32 codes of 4 bits for int8 inputs came for PackedLinear 8x32",
        ),
        (PackedLinear(weight(8, 32), activations="int16").layout, "for int16 inputs came"),
        (conv().layout, "made by another version"),
        (layer.layout.float(), "must be contiguous uint8 on the CPU"),
        (None, "layout of PackedLinear 8x32 is a NoneType"),
    ):
        with pytest.raises(BantamweightError, match=says):
            layer.layout = layout
        assert layer.quantized.equals(other.quantized)
    with pytest.raises(BantamweightError, match=r"a layout of Conv2dLayout\(.*stride=\(2, 2\)"):
        image = conv()
        image.layout = conv(stride=2).layout


def test_what_the_layout_settles_cannot_be_changed() -> None:
    image, table = conv(), PackedEmbedding(weight(9, 16))
    for layer, name, value in (
        (linear(), "out_features", 100),
        (linear(), "in_features", 31),
        (linear(), "activations", "int16"),
        (image, "stride", (2, 2)),
        (image, "padding_mode", "circular"),
        (table, "embedding_dim", 17),
    ):
        with pytest.raises(BantamweightError, match=f"{name} of Packed.* settled when the layer is packed"):
            setattr(layer, name, value)
    image.stride = (1, 1)  # which it is
    with pytest.raises(BantamweightError, match="has its weight as codes in a kernel's layout; put another one"):
        table.weight = nn.Parameter(torch.zeros(9, 16))  # type: ignore[assignment]
    with pytest.raises(BantamweightError, match="hands its bias to a kernel, which no deletion and no parametrization"):
        register_parametrization(image, "bias", nn.Identity())
    image(torch.randn(1, 4, 5, 5))


@torch.no_grad()
def test_functional_call_uses_its_bias_and_leaves_the_layers() -> None:
    layer = linear()
    before, ones = layer(X), torch.ones(8)
    called = torch.func.functional_call(layer, {"bias": layer.bias + ones}, (X,))  # type: ignore[operator]
    torch.testing.assert_close(called, before + 1)
    assert torch.equal(layer(X), before)


@torch.no_grad()
def test_conversions_of_every_buffer_leave_the_layout() -> None:
    layer = linear()
    expected, w = layer(X), layer.quantized
    for convert in (
        lambda: layer.type(torch.float64),
        lambda: layer.type(torch.uint8),
        lambda: layer.half(),
        lambda: layer.share_memory(),
    ):
        convert()
        assert torch.equal(layer(X), expected)
    layer.to_empty(device="cpu")  # the bias holds anything now
    assert layer.quantized.equals(w)
    with torch.device("meta"):
        layer.float()


@torch.no_grad()
def test_copies_and_pickles_have_memory_of_their_own() -> None:
    def reloaded(layer: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    for layer, x in ((linear(), X), (conv(), torch.randn(2, 4, 5, 5)), (PackedEmbedding(weight(9, 16)), INDEX)):
        layer.bfloat16()
        layer.weight  # noqa: B018  (which is kept)
        expected = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), reloaded(layer)):
            assert torch.equal(twin(x), expected) and twin.weight.dtype == torch.bfloat16
            assert twin._addresses[0] != layer._addresses[0]


def test_a_state_dict_without_values_is_refused() -> None:
    layer = linear()
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="its tensors are on the meta device"):
        layer.load_state_dict({name: value.to("meta") for name, value in state.items()})
    with pytest.raises(RuntimeError, match=r"bias is torch.float32 \[8\] on meta"):
        layer.load_state_dict(state | {"bias": state["bias"].to("meta")}, assign=True)


# --- what models read


def forms() -> list[tuple[Any, Any, torch.Tensor]]:
    """A packed layer, its simulated form and an input."""
    pairs = [(linear(), X), (conv(groups=2), torch.randn(2, 4, 6, 6)), (PackedEmbedding(weight(9, 16)), INDEX)]
    return [(packed, unpack(packed), x) for packed, x in pairs]


@torch.no_grad()
def test_the_weight_is_a_tensor_in_the_layers_shape() -> None:
    shapes = [(8, 32), (8, 2, 3, 3), (9, 16)]
    for (packed, simulated, _), shape in zip(forms(), shapes, strict=True):
        w = packed.weight
        assert isinstance(w, torch.Tensor) and w is packed.weight
        assert (w.dtype, tuple(w.shape), w.size(0), w.ndim) == (torch.float32, shape, shape[0], len(shape))
        assert w.device == torch.device("cpu") and not w.requires_grad and not w.is_meta and w.is_floating_point()
        assert torch.equal(w, simulated.weight) and torch.equal(w.clone(), simulated.weight)
        names = [*packed.state_dict(), *dict(packed.named_buffers()), *dict(packed.named_parameters())]
        assert not any("weight" in name for name in names)


@torch.no_grad()
def test_what_is_computed_with_the_weight_is_right() -> None:
    (fc, fc_form, x), (image, image_form, pixels), (table, _, index) = forms()
    expected = F.linear(x, fc_form.weight, fc_form.bias)
    assert torch.equal(F.linear(x, fc.weight, fc.bias), expected)
    assert torch.equal(F.linear(x, fc.weight.data, fc.bias), expected)
    torch.testing.assert_close(x @ fc.weight.T + fc.bias, expected)
    for function in (
        lambda w: w[2:5],
        lambda w: w.view(-1)[7],
        lambda w: torch.cat(w.chunk(2)),
        lambda w: w.float().to(torch.bfloat16),
        lambda w: w.norm() + w.std(),
        lambda w: torch.from_numpy(w.numpy()),
        lambda w: torch.tensor(w.tolist()),
        lambda w: torch.empty_like(w).copy_(w),
        lambda w: pickle.loads(pickle.dumps(w)),
        copy.deepcopy,
    ):
        assert torch.equal(function(fc.weight), function(fc_form.weight))
    assert f"{fc.weight[0, 0]:.2f}" == f"{fc_form.weight[0, 0]:.2f}" and "LazyWeight([8, 32]" in repr(fc.weight)
    assert torch.equal(
        F.conv2d(pixels, image.weight, image.bias, padding=1, groups=2),
        image_form._conv_forward(pixels, image_form.weight, image.bias),
    )
    assert torch.equal(F.embedding(index, table.weight), table(index))
    with torch.inference_mode():
        assert torch.equal(F.linear(x, fc.weight, fc.bias), expected)


def test_gradients_pass_by_the_weight() -> None:
    fc, x = linear(), X.clone().requires_grad_()
    F.linear(x, fc.weight).sum().backward()
    torch.testing.assert_close(x.grad, fc.weight.sum(0).expand(4, 32))


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.zero_(),
        lambda w: w.data.mul_(2),
        lambda w: w[0].zero_(),
        lambda w: w.view(-1)[3:].fill_(1),
        lambda w: w.T.copy_(torch.zeros(32, 8)),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: setattr(w, "data", torch.zeros(8, 32)),
        lambda w: w.requires_grad_(),
        lambda w: setattr(w, "requires_grad", True),
        lambda w: w.set_(torch.zeros(8, 32)),
        lambda w: w.resize_(4),
        lambda w: torch.add(w, 1, out=w),
        lambda w: torch._foreach_add_([w], 1),
        lambda w: nn.init.xavier_uniform_(w),
    ],
)
def test_a_change_of_the_weight_is_never_lost_in_silence(change: Callable[[Any], Any]) -> None:
    with pytest.raises(BantamweightError, match="the weight of a packed layer is computed from its codes and cannot"):
        change(linear().weight)
    with pytest.raises(BantamweightError, match="has no memory of its own"):
        linear().weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_models_that_cast_to_the_dtype_of_a_weight(dtype: torch.dtype) -> None:
    class Block(nn.Module):
        def __init__(self, packed: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.norm = PackedEmbedding(weight(9, 32)), nn.LayerNorm(32)
            self.fc, self.patch, self.head = linear(), conv(), nn.Linear(8, 2)
            if not packed:
                self.table, self.fc, self.patch = unpack(self.table), unpack(self.fc), unpack(self.patch)

        def forward(self, index: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
            x = self.fc(self.norm(self.table(index)).to(self.fc.weight.dtype))
            image = self.patch(pixels.to(self.patch.weight.dtype)).mean((2, 3))
            return self.head(x.mean(1) + image)

    pixels = torch.randn(2, 4, 5, 5)
    packed, simulated = Block(True).to(dtype), Block(False).to(dtype)
    assert packed.fc.weight.dtype == packed.table(INDEX).dtype == dtype
    y, expected = packed(INDEX, pixels), simulated(INDEX, pixels)
    assert y.dtype == dtype and (y - expected).float().norm() <= 0.02 * expected.float().norm()
    assert packed.double().fc.weight.dtype == torch.float32  # packed layers take no float64
    assert packed.fc.bias is not None and packed.fc.bias.dtype == torch.float32


@torch.no_grad()
def test_graphs_read_the_weight_too() -> None:
    class Reads(nn.Module):
        def __init__(self, fc: nn.Module) -> None:
            super().__init__()
            self.fc = fc

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.to(self.fc.weight.dtype)) + F.linear(x, self.fc.weight, self.fc.bias)

    model = Reads(linear()).eval()
    expected = model(X)
    assert torch.equal(torch.export.export(model, (X,)).module()(X), expected)
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(X), expected)
    assert torch.equal(torch.jit.trace(model, (X,))(X), expected)


@torch.no_grad()
def test_inputs_by_keyword_and_torchs_attributes() -> None:
    for packed, simulated, x in forms():
        for layer in (packed, simulated):
            assert torch.equal(layer(input=x), layer(x))
    for layer in (linear(), unpack(linear())):
        assert (layer.in_features, layer.out_features) == (32, 8)
    own = nn.Conv2d(4, 8, 3, padding=1, groups=2)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    for layer in (conv(groups=2), unpack(conv(groups=2))):
        for name in (*names, "transposed", "output_padding"):
            assert getattr(layer, name) == getattr(own, name)
        pixels = torch.randn(1, 4, 5, 5)
        y = layer._conv_forward(pixels, layer.weight, layer.bias)
        assert (y - layer(pixels)).norm() <= 0.02 * y.norm()
    table = nn.Embedding(9, 16, padding_idx=-1)
    for layer in (
        PackedEmbedding(weight(9, 16), padding_idx=-1),
        unpack(PackedEmbedding(weight(9, 16), padding_idx=-1)),
    ):
        for name in ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"):
            assert getattr(layer, name) == getattr(table, name)
        assert layer.sparse is False


@pytest.mark.parametrize("arguments", [{}, {"padding_mode": "reflect"}, {"groups": 4}, {"stride": 2}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_convolution_answers_in_the_memory_format_of_its_input(arguments: dict, dtype: torch.dtype) -> None:
    layer = conv(**arguments)
    simulated = unpack(layer).to(dtype)
    wide = torch.randn(2, 4, 12, 12).to(dtype)
    x = wide[:, :, :6, :6].contiguous()
    for image in (x, wide[:, :, :6, :6], wide[:, :, ::2, ::2], x[:0]):
        y = layer(image)
        assert y.is_contiguous() and torch.equal(y, layer(image.contiguous()))
        assert y.view(len(image), y[0].numel() if len(image) else 8).shape[0] == len(image)
    last = x.to(memory_format=torch.channels_last)
    y = layer(last)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    assert torch.equal(y, layer(x)) and y.stride() == simulated(last).stride()
    assert layer(x[0]).is_contiguous() and torch.equal(layer(x[0]), y[0])
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    for image in (x, last):
        assert traced(image).stride() == layer(image).stride() and torch.equal(traced(image), layer(image))
    exported = torch.export.export(layer, (x,)).module()(x)
    assert torch.equal(exported, layer(x)) and exported.is_contiguous()


@torch.no_grad()
def test_a_map_of_one_pixel_or_one_channel_is_not_copied() -> None:
    pixel = torch.randn(3, 4, 1, 1)
    y = conv()(pixel)
    assert y.is_contiguous() and y.stride()[1] == 1
    single = PackedConv2d.from_quantized(weight(1, 36), in_channels=4, kernel_size=3, padding=1)
    assert single(torch.randn(2, 4, 5, 5)).is_contiguous()
    gray = PackedConv2d.from_quantized(weight(8, 9), in_channels=1, kernel_size=3, padding=1)
    assert gray(torch.randn(2, 1, 5, 5)).view(2, -1).shape == (2, 200)


@torch.no_grad()
def test_a_negated_view_is_read_as_it_counts() -> None:
    image = torch.randn(2, 4, 5, 5, dtype=torch.complex64).conj().imag
    assert image.is_neg()
    layer = conv()
    assert torch.equal(layer(image), layer(image.resolve_neg().contiguous()))
    rows = torch.randn(3, 32, dtype=torch.complex64).conj().imag
    fc = linear()
    assert torch.equal(fc(rows), fc(rows.resolve_neg().contiguous()))


@torch.no_grad()
def test_a_forward_of_ones_own_is_called() -> None:
    class Doubled(PackedLinear):
        def forward(self, input: Any) -> torch.Tensor:
            return 2 * super().forward(input)

    w = weight(8, 32)
    plain = PackedLinear(w)
    assert torch.equal(Doubled(w)(X), 2 * plain(X))
    own = plain.forward
    plain.forward = lambda input: own(input) + 1  # type: ignore[method-assign]
    assert torch.equal(plain(X), own(X) + 1)


@torch.no_grad()
def test_simulated_layers_come_back_from_half_and_keep_their_codes() -> None:
    for form in (SimulatedLinear(weight(8, 32)), SimulatedConv2d(weight(8, 36), in_channels=4, kernel_size=(3, 3))):
        before, w = form.weight.clone(), form.quantized
        assert torch.equal(form.half().float().weight, before)
        form.type(torch.float64)
        assert form.codes.dtype == torch.uint8 and form.quantized.equals(w) and form.weight.dtype == torch.float64


@torch.no_grad()
def test_a_traced_graph_reads_the_weight_when_it_runs() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) * self.conv.weight.abs().mean()

    model, x = Reads(), torch.randn(2, 4, 6, 6)
    traced = torch.fx.GraphModule(model, LayerTracer().trace(model))
    torch.testing.assert_close(traced(x), model(x))
