"""The model file: exact round trips, and one sentence for every damaged, hostile or foreign file."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bantamweight as bw
import pytest
import torch
from bantamweight import _C
from bantamweight.errors import BantamweightError, FormatError
from bantamweight.nn import PackedConv2d, PackedLinear, SimulatedConv2d, SimulatedLinear, fold_batchnorm
from bantamweight.weights import QuantizedWeight, conv_matrix
from torch import nn


class Net(nn.Module):
    """Convolutions with and without BatchNorm, a layer used twice, tied tensors and an integer buffer."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.BatchNorm2d(8)
        self.kept = nn.Conv2d(8, 8, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.mix = nn.Linear(8, 8)
        self.mix_again = self.mix
        self.head = nn.Linear(8, classes)
        self.gain = nn.Parameter(torch.ones(8))
        self.gain_again = self.gain
        self.register_buffer("steps", torch.tensor([3, 4]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.kept(x)).mean((2, 3)) * self.gain
        return self.head(self.mix_again(torch.relu(self.mix(x))) + self.gain_again)


def rounded(layer: nn.Module, levels: int, group_size: int | None = None, shift: float = 0.0) -> nn.Module:
    weight: Any = layer.weight
    matrix = weight.detach() if weight.ndim == 2 else conv_matrix(weight.detach())
    zero = levels // 2 + torch.linspace(0, shift, len(matrix))
    scale = matrix.abs().amax(1) / (levels // 2)
    codes = (torch.round(matrix / scale[:, None]) + levels // 2).clamp(0, levels - 1).to(torch.uint8)
    groups = -(-matrix.shape[1] // (group_size or matrix.shape[1]))
    scale, zero = scale[:, None].expand(-1, groups), zero[:, None].expand(-1, groups)
    w = QuantizedWeight.from_codes(codes, scale, zero, levels=levels, group_size=group_size)
    if isinstance(layer, nn.Conv2d):
        return SimulatedConv2d.from_float(layer, w, activation_bits=8)
    assert isinstance(layer, nn.Linear)
    return SimulatedLinear.from_float(layer, w, activation_bits=8)


def quantized_net(fold: bool = True) -> Net:
    """Every layer but `kept` at another scheme; seeds make it the same each time."""
    torch.manual_seed(0)
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            module.running_mean.normal_()  # type: ignore[union-attr]
    net.gain.data.normal_()
    if fold:
        net = fold_batchnorm(net.eval())[0]
    net.conv1, net.conv2 = rounded(net.conv1, 3), rounded(net.conv2, 8, 12)  # type: ignore[assignment]
    net.mix = net.mix_again = rounded(net.mix, 16, 4, shift=0.5)  # type: ignore[assignment]
    net.head = rounded(net.head, 256)  # type: ignore[assignment]
    return net.eval()


X = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    bw.save(bw.pack(quantized_net()), path, extra={"accuracy": 0.9134, "classes": ["a", "b"]})
    return path


@pytest.mark.parametrize("fold", [True, False])
@torch.no_grad()
def test_round_trip_is_exact(fold: bool, tmp_path: Path) -> None:
    net = quantized_net(fold)
    packed = bw.pack(net)
    path = tmp_path / "model.safetensors"
    for source in (net, packed):
        bw.save(source, path)
        loaded = bw.load(path, Net())
        assert isinstance(loaded.conv1, PackedConv2d) and isinstance(loaded.head, PackedLinear)
        assert loaded.mix is loaded.mix_again and not loaded.training
        assert torch.equal(loaded(X), packed(X))
        simulated = bw.load(path, Net(), form="simulated")
        assert torch.equal(simulated(X), net(X))
        assert simulated.conv2.quantized.equals(net.conv2.quantized)
        assert torch.equal(simulated.steps, torch.tensor([3, 4]))
    again = tmp_path / "again.safetensors"
    bw.save(loaded, again)
    assert again.read_bytes() == path.read_bytes()  # the same model is the same file


@pytest.mark.parametrize("kernel", [name for name, missing in _C.linear_variants() if not missing])
@torch.no_grad()
def test_every_kernel_runs_the_file_alike(kernel: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bw.load(saved, Net())(X)
    monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", kernel)
    loaded = bw.load(saved, Net())
    assert {record.kernel for record in loaded.packing.layers} == {kernel}
    assert torch.equal(loaded(X), expected)


@torch.no_grad()
def test_a_model_on_the_meta_device_is_filled(saved: Path) -> None:
    with torch.device("meta"):
        net = Net()
    assert torch.equal(bw.load(saved, net)(X), bw.load(saved, Net())(X))


def test_the_file_is_small_and_canonical(saved: Path) -> None:
    header = bw.read_header(saved)
    assert header.extra == {"accuracy": 0.9134, "classes": ["a", "b"]}
    assert header.folded == {"bn1": "conv1", "bn2": "conv2", "bn3": "kept"}
    assert header.same_layer == {"mix_again": "mix"} and header.same_tensor == {"gain_again": "gain"}
    packings = {name: record.packing for name, record in header.layers.items()}
    assert packings == {"conv1": "base3", "conv2": "bits3", "mix": "bits4", "head": "bits8"}
    assert header.layers["conv2"].conv.stride == (2, 2) and header.layers["mix"].zero is None
    raw = saved.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    tensors = json.loads(raw[8 : 8 + size])
    assert tensors["conv1.codes"] == {
        "dtype": "U8",
        "shape": [8, 6],
        "data_offsets": tensors["conv1.codes"]["data_offsets"],
    }
    assert "conv1.zero" not in tensors and "mix.zero" in tensors and "bn1.weight" not in tensors


def test_a_lone_layer(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    layer = bw.pack(rounded(nn.Linear(6, 4), 16))
    bw.save(layer, path)
    with torch.no_grad():
        assert torch.equal(bw.load(path, nn.Linear(6, 4))(torch.ones(2, 6)), layer(torch.ones(2, 6)))


def test_a_half_precision_model_keeps_its_scales(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    net = quantized_net().half()
    bw.save(net, path)
    loaded = bw.load(path, Net(), form="simulated")
    assert loaded.conv1.quantized.equals(net.conv1.quantized) and loaded.gain.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("form", ["packed", "simulated"])
@torch.no_grad()
def test_layers_take_the_dtype_of_those_they_replace(dtype: torch.dtype, form: str, saved: Path) -> None:
    net = bw.load(saved, Net().to(dtype), form=form)
    if form == "packed" and dtype == torch.float64:
        assert "float64, which no kernel takes" in net.packing.layers[0].reason and isinstance(
            net.conv1, SimulatedConv2d
        )
    assert net.conv1.weight.dtype == net.kept.weight.dtype == net.gain.dtype == dtype
    y, expected = net(X.to(dtype)), bw.load(saved, Net())(X)
    assert y.dtype == dtype and (y - expected).float().norm() <= 0.05 * expected.norm()


@torch.no_grad()
def test_layers_are_filled_where_they_are(saved: Path) -> None:
    class Wide(nn.Conv2d):
        """A subclass, as models make to add a name or an initialization."""

    net = Net()
    net.conv1 = Wide(3, 8, 3, padding=1, bias=False)
    net.head.of_user = "kept"  # type: ignore[assignment]
    held, seen = [net.conv1, net.head, net.mix, net.bn1], []
    net.head.register_forward_hook(lambda module, inputs, y: seen.append(type(module)))
    loaded = bw.load(saved, net)
    assert loaded is net and all(a is b for a, b in zip(held, (net.conv1, net.head, net.mix, net.bn1), strict=True))
    assert [type(module) for module in held] == [PackedConv2d, PackedLinear, PackedLinear, nn.Identity]
    assert torch.equal(loaded(X), bw.load(saved, Net())(X))
    assert seen == [PackedLinear] and net.head.of_user == "kept"
    lone = rounded(nn.Linear(6, 4), 16)
    path = saved.parent / "lone.safetensors"
    bw.save(lone, path)
    layer = nn.Linear(6, 4)
    assert bw.load(path, layer) is layer and isinstance(layer, PackedLinear)


@torch.no_grad()
def test_layers_of_the_other_form_are_filled_too(saved: Path) -> None:
    expected = bw.load(saved, Net())
    for form in ("packed", "simulated"):
        other = bw.load(saved, bw.load(saved, Net(), form=form), form="packed")
        assert torch.equal(other(X), expected(X)) and vars(other.conv1).keys() == vars(expected.conv1).keys()


def test_one_layer_in_the_model_and_two_in_the_file(tmp_path: Path, saved: Path) -> None:
    class Pair(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a if tied else nn.Linear(4, 4)

    for quantized in (("a", "b"), ("a",)):
        net = Pair(tied=False)
        for name in quantized:
            setattr(net, name, rounded(getattr(net, name), 16))
        bw.save(net, tmp_path / "two.safetensors")
        with pytest.raises(FormatError, match=r"'[ab]' and '[ab]' are one layer of Pair, but not of the saved model"):
            bw.load(tmp_path / "two.safetensors", Pair(tied=True))
    net = Pair(tied=True)
    net.a = net.b = rounded(net.a, 16)  # type: ignore[assignment]
    bw.save(net, tmp_path / "one.safetensors")
    loaded = bw.load(tmp_path / "one.safetensors", Pair(tied=False))
    assert loaded.a is loaded.b and loaded.a.quantized.equals(net.a.quantized)


class Positions(nn.Module):
    """Tensors of which a state dict, and so a file, holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.tied = self.norm.weight
        self.register_buffer("ids", torch.arange(4), persistent=False)
        self.steps = [torch.ones(2)]
        self.offset = torch.ones(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.fc(x)) * self.tied + self.ids * self.offset


@torch.no_grad()
def test_nothing_stays_on_the_meta_device(tmp_path: Path) -> None:
    path, net = tmp_path / "model.safetensors", Positions().eval()
    net.norm.weight.normal_()
    net.fc = rounded(net.fc, 16)  # type: ignore[assignment]
    bw.save(net, path)
    with torch.device("meta"):
        empty = Positions()
    with pytest.raises(
        FormatError, match=r"'steps', 'offset', 'ids' of Positions|'ids', 'steps', 'offset' of Positions"
    ):
        bw.load(path, empty)
    assert type(empty.fc) is nn.Linear and empty.norm.weight.is_meta  # the model is as it was
    # Weights on the meta device, and whatever is computed when the model is made on the CPU.
    half = Positions().bfloat16()
    for module in (half, half.norm, half.fc):
        for name, parameter in module._parameters.items():
            module._parameters[name] = nn.Parameter(parameter.to("meta"))
    half.tied = half.norm.weight
    loaded = bw.load(path, half)
    assert loaded.tied is loaded.norm.weight and loaded.norm.weight.dtype == torch.bfloat16
    x = torch.randn(3, 4)
    assert not any(value.is_meta for value in (*loaded.parameters(), *loaded.buffers()))
    torch.testing.assert_close(loaded(x.bfloat16()).float(), net(x), rtol=0.1, atol=0.1)


def test_a_model_without_shapes_is_refused(saved: Path) -> None:
    net = Net()
    net.head = nn.LazyLinear(5)
    with pytest.raises(FormatError, match=r"'head.weight' of Net has no shape yet; run the model on an input once"):
        bw.load(saved, net)


def test_modules_that_count_versions_of_their_state(tmp_path: Path) -> None:
    class Versioned(nn.Module):
        _version = 2

        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.read: list[int | None] = []

        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            self.read.append(metadata.get("version"))
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    net = Versioned()
    net.norm.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    net.fc = rounded(net.fc, 16)  # type: ignore[assignment]
    bw.save(net, tmp_path / "model.safetensors")
    loaded = bw.load(tmp_path / "model.safetensors", Versioned())
    assert loaded.read == [2] and int(loaded.norm.num_batches_tracked) == 7


class Holder(nn.Module):
    def __init__(self, **buffers: torch.Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        for name, value in buffers.items():
            self.register_buffer(name, value)


def odd_buffers() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {
        "scalar": torch.tensor(3.5),
        "bools": torch.tensor([True, False, True]),
        "bytes": torch.tensor([-3, 7], dtype=torch.int8),
        "words": torch.tensor([2**40, -1]),
        "unsigned": torch.tensor([65535], dtype=torch.uint16),
        "nothing": torch.empty(0, 3),
        "wide": torch.randn(3, dtype=torch.float64),
        "complex": torch.randn(3, dtype=torch.complex64),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "imaginary": torch.randn(3, dtype=torch.complex64).conj().imag,
        "expanded": torch.randn(1, 3).expand(4, 3),
        "strided": torch.randn(3, 6)[:, ::2],
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "eighths": torch.randn(4).to(torch.float8_e4m3fn),
        "fifths": torch.randn(4).to(torch.float8_e5m2),
    }
    return {**found, "tied": found["words"], "part": found["words"][:1]}


def test_buffers_of_every_kind(tmp_path: Path) -> None:
    path, net, other = tmp_path / "model.safetensors", Holder(**odd_buffers()), Holder(**odd_buffers())
    net.fc = rounded(net.fc, 16)  # type: ignore[assignment]
    bw.save(net, path)
    assert bw.read_header(path).same_tensor == {"tied": "words"}
    for name, value in other.named_buffers(recurse=False):
        if name != "expanded":
            value.copy_(torch.zeros_like(value))
    loaded = bw.load(path, other)
    for name, value in net.named_buffers(recurse=False, remove_duplicate=False):
        ours = loaded.get_buffer(name)
        assert ours.dtype == value.dtype and ours.shape == value.shape
        plain = [t.resolve_conj().resolve_neg().contiguous().reshape(-1) for t in (ours, value)]
        assert plain[0].view(torch.uint8).tolist() == plain[1].view(torch.uint8).tolist(), name


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.ones(3, dtype=torch.complex128), "odd is a Tensor of torch.complex128, but"),
        (lambda: torch.eye(3).to_sparse(), "odd is a torch.sparse_coo Tensor of torch.float32, but"),
        (lambda: torch.eye(3).to_sparse_csr(), "odd is a torch.sparse_csr Tensor"),
        (lambda: torch.ones(3, device="meta"), "odd is a Tensor of torch.float32 on the meta device, but"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "odd is a nested Tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "odd is a .*Tensor of torch.qint8"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_that_no_file_holds_is_named(make: Callable[[], torch.Tensor], says: str, tmp_path: Path) -> None:
    net = Holder(odd=make())
    net.fc = rounded(net.fc, 16)  # type: ignore[assignment]
    with pytest.raises(BantamweightError, match=says):
        bw.save(net, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []
    net = Holder()
    net.fc, net.more = rounded(net.fc, 16), nn.LazyLinear(3)  # type: ignore[assignment]
    with pytest.raises(BantamweightError, match=r"more.weight is a lazy UninitializedParameter"):
        bw.save(net, tmp_path / "model.safetensors")


@pytest.mark.parametrize("form", ["packed", "simulated"])
@torch.no_grad()
def test_a_loaded_model_outlives_its_file(form: str, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(saved.read_bytes())
    expected = bw.load(saved, Net(), form=form)(X)
    with torch.device("meta"):
        empty = Net()
    loaded = [bw.load(path, Net(), form=form), bw.load(path, empty, form=form)]
    with open(path, "r+b") as file:
        file.truncate(0)
    for net in loaded:
        assert torch.equal(net(X), expected)
        net.state_dict()["head.scale"].sum()


def test_what_was_prepared_is_in_the_header(saved: Path, tmp_path: Path) -> None:
    assert bw.read_header(saved).prepared == {} and b'"prepared"' not in saved.read_bytes()  # as files were before it
    net = Holder()
    net.fc = rounded(net.fc, 16)  # type: ignore[assignment]
    net.prepared = {"fc": {"kind": "no such kind", "sizes": (1, 2)}}  # type: ignore[assignment]
    path = tmp_path / "model.safetensors"
    bw.save(net, path)
    assert bw.read_header(path).prepared == {"fc": {"kind": "no such kind", "sizes": [1, 2]}}
    with pytest.raises(FormatError, match="'no such kind', which this version does not know; load it with"):
        bw.load(path, Holder())


def write(path: Path, header: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def edited(saved: Path, to: Path, edit: Callable[[dict[str, Any], dict[str, Any], bytearray], None]) -> Path:
    """The saved file with its tensor table, its bantamweight header or its data changed."""
    raw = saved.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    table, data = json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :])
    header = json.loads(table["__metadata__"]["bantamweight"])
    edit(table, header, data)
    table["__metadata__"]["bantamweight"] = json.dumps(header)
    return write(to, table, bytes(data))


def put(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any], bytearray], None]:
    """Sets a field of the bantamweight header by its dotted path."""

    def edit(table: dict[str, Any], header: dict[str, Any], data: bytearray) -> None:
        *way, last = name.split("/")
        for step in way:
            header = header[step]
        header[last] = value

    return edit


def fill(name: str, content: bytes) -> Callable[[dict[str, Any], dict[str, Any], bytearray], None]:
    """Overwrites the first bytes of a tensor."""

    def edit(table: dict[str, Any], header: dict[str, Any], data: bytearray) -> None:
        at = table[name]["data_offsets"][0]
        data[at : at + len(content)] = content

    return edit


def retype(name: str, dtype: str) -> Callable[[dict[str, Any], dict[str, Any], bytearray], None]:
    def edit(table: dict[str, Any], header: dict[str, Any], data: bytearray) -> None:
        table[name]["dtype"] = dtype

    return edit


def drop_layer(table: dict[str, Any], header: dict[str, Any], data: bytearray) -> None:
    del header["layers"]["head"]


def rename_tensor(table: dict[str, Any], header: dict[str, Any], data: bytearray) -> None:
    table["head.scales"] = table.pop("head.scale")


NAN = struct.pack("<f", float("nan"))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (put("format_version", 2), "format_version is 2, but this bantamweight reads up to 1; upgrade bantamweight"),
        (put("format_version", "1"), "format_version is '1', but must be a whole number"),
        (put("format_version", True), "format_version is True"),
        (put("layers", []), "layers is [], but must be a JSON object"),
        (put("layers/head", 7), "layer 'head' is 7, but must be a JSON object"),
        (put("layers/head/kind", "lstm"), "layer 'head''s kind is 'lstm', but must be 'linear' or 'conv2d'"),
        (put("layers/head/shape", [5]), "shape is [5], but must be two whole numbers"),
        (put("layers/head/shape", [5, 2**62]), "shape is 4611686018427387904, but must be a whole number from 0"),
        (put("layers/head/shape", [5, 9]), "'head' is linear 5x9, but the model's is linear 5x8"),
        (put("layers/head/levels", 1), "levels is 1, but must be a whole number from 2 to 256"),
        (put("layers/head/levels", 4.0), "levels is 4.0"),
        (put("layers/head/packing", "bits4"), "packing is 'bits4', but must be 'bits8'"),
        (put("layers/head/group_size", 0), "group_size is 0"),
        (put("layers/head/group_size", 4), "'head.scale' is F32 [5, 1], but its header calls for F32 [5, 2]"),
        (put("layers/head/zero", "x"), "zero is 'x', but must be a finite number or null"),
        (put("layers/head/zero", float("nan")), "zero is nan"),
        (put("layers/head/zero", 10**400), "zero is 1000"),
        (put("layers/head/zero", None), "lacks 'head.zero', which the model needs"),
        (put("layers/head/bias", 1), "bias is 1, but must be true or false"),
        (put("layers/head/activation_bits", 4), "activation_bits is 4, but must be 8 or null"),
        (put("layers/head/activations", "int4"), "activations is 'int4', but must be"),
        (put("layers/head/secret", 1), "field 'secret' is 1, but must be absent in this version"),
        (put("layers/conv2/conv/stride", [1, 1]), "layer 'conv2' is conv2d of 8 channels out"),
        (put("layers/conv2/conv/groups", 0), "groups is 0"),
        (put("layers/conv2/conv/padding", "full"), "padding is 'full', but must be two whole numbers"),
        (put("layers/conv2/conv", None), "conv is None, but must be a JSON object"),
        (put("layers/extra_layer", {}), "layer 'extra_layer''s kind is None"),
        (put("same_layer/mix_again", "nothing"), "same_layer['mix_again'] is 'nothing'"),
        (put("same_layer/mix_again", 3), "same_layer['mix_again'] is 3, but must be a name"),
        (put("same_tensor/gain_again", "steps"), "'gain_again' is tied to 'steps', but the model has no such pair"),
        (put("folded/bn9", "conv1"), "BatchNorm 'bn9' was folded into 'conv1', but the model has no such pair"),
        (put("folded/head", "conv1"), "BatchNorm 'head' was folded into 'conv1'"),
        (put("folded/bn1", "conv9"), "BatchNorm 'bn1' was folded into 'conv9'"),
        (put("quantization", 3), "quantization is 3"),
        (put("prepared", []), "prepared is [], but must be a JSON object"),
        (put("prepared", {"head": 3}), "prepared['head'] is 3, but must be a JSON object"),
        (drop_layer, "lacks 'head.weight', which the model needs"),
        (rename_tensor, "lacks 'head.scale', which the model needs"),
        (fill("head.scale", NAN), "layer 'head': scale holds NaN or infinity"),
        (fill("head.bias", NAN), "layer 'head': bias holds NaN"),
        (fill("conv1.codes", b"\xff"), "layer 'conv1': a byte of base-3 codes is above 242"),
        (put("layers/head/levels", 200), "layer 'head': a code is 255, but codes of 200 levels go from 0 to 199"),
        (retype("head.codes", "I8"), "'head.codes' is I8 [5, 8], but its header calls for U8 [5, 8]"),
        (retype("head.scale", "I32"), "'head.scale' is I32 [5, 1], but its header calls for F32 [5, 1]"),
        (retype("gain", "I32"), "'gain' is I32 [8], but the model has torch.float32 [8]"),
        (retype("steps", "U64"), "'steps' is U64 [2], but the model has torch.int64 [2]"),
        (retype("steps", "F64"), "'steps' is F64 [2], but the model has torch.int64 [2]"),
        (lambda table, header, data: table["gain"].update(shape=[2, 4]), "'gain' is F32 [2, 4], but the model has"),
        (lambda table, header, data: table["gain"].update(shape=[2**40]), "cannot be read as a safetensors file"),
        (lambda table, header, data: table["gain"].update(data_offsets=[0, 2**60]), "cannot be read as a safetensors"),
        (lambda table, header, data: data.extend(b"tail"), "cannot be read as a safetensors file"),
        (lambda table, header, data: data.clear(), "cannot be read as a safetensors file"),
    ],
)
def test_hostile_files_get_one_sentence(saved: Path, tmp_path: Path, edit: Any, says: str) -> None:
    if says.startswith("layer 'head': a code is 255"):  # a file of 256 levels, declared to have fewer
        saved = edited(saved, tmp_path / "first", fill("head.codes", b"\xff"))
    bad = edited(saved, tmp_path / "bad.safetensors", edit)
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(FormatError) as caught:
        bw.load(bad, net)
    sentence = str(caught.value)
    assert says in sentence and str(bad) in sentence and "\n" not in sentence
    assert type(net.conv1) is nn.Conv2d and type(net.bn1) is nn.BatchNorm2d  # the model is as it was
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_truncated_and_foreign_files(saved: Path, tmp_path: Path) -> None:
    whole, bad = saved.read_bytes(), tmp_path / "bad.safetensors"
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"cannot be read as a safetensors file"):
            bw.load(bad, Net())
    for content in (b"PK\x03\x04" * 100, struct.pack("<Q", 2**63) + whole[8:], struct.pack("<Q", 10**9) + whole[8:]):
        bad.write_bytes(content)
        with pytest.raises(FormatError, match=r"cannot be read as a safetensors file"):
            bw.load(bad, Net())
    write(bad, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"0000")
    with pytest.raises(FormatError, match="a safetensors file without a bantamweight header"):
        bw.load(bad, Net())
    for text in ("{", "[1]", "[" * 100_000, '{"format_version": ' + "9" * 5000 + "}"):
        write(bad, {"__metadata__": {"bantamweight": text}}, b"")
        with pytest.raises(FormatError, match=r"its header is not JSON|the header is|format_version is"):
            bw.read_header(bad)
    with pytest.raises(FormatError, match=r"is not a file; pass the path of a model file"):
        bw.load(tmp_path / "missing.safetensors", Net())
    with pytest.raises(FormatError, match="is not a file"):
        bw.load(tmp_path, Net())


def test_another_models_file(saved: Path) -> None:
    with pytest.raises(FormatError, match="'head' is linear 5x8, but the model's is linear 7x8"):
        bw.load(saved, Net(7))
    with pytest.raises(FormatError, match="has a layer 'conv1', which Sequential lacks"):
        bw.load(saved, nn.Sequential(nn.Linear(2, 2)))
    net = Net()
    net.head = nn.ReLU()  # type: ignore[assignment]
    with pytest.raises(FormatError, match="has a linear layer 'head', which in Net is a ReLU"):
        bw.load(saved, net)
    net = Net()
    net.more = nn.Linear(2, 2)
    with pytest.raises(FormatError, match=r"lacks 'more\.bias' and 1 more, which the model needs"):
        bw.load(saved, net)
    net = Net()
    del net.steps
    with pytest.raises(FormatError, match="has 'steps', which the model does not know"):
        bw.load(saved, net)
    with pytest.raises(BantamweightError, match="form is 'float', but must be 'packed' or 'simulated'"):
        bw.load(saved, Net(), form="float")


def test_what_cannot_be_saved_is_refused(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(BantamweightError, match="Net has no quantized layer to save; call quantize first"):
        bw.save(Net(), tmp_path / "model.safetensors")

    class Stateful(nn.Identity):
        def get_extra_state(self) -> str:
            return "secret"

    net = nn.Sequential(rounded(nn.Linear(2, 2), 4), Stateful())
    with pytest.raises(BantamweightError, match=r"1\._extra_state of the model's state dict is a str"):
        bw.save(net, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []
    before = saved.read_bytes()
    with pytest.raises(BantamweightError):
        bw.save(net, saved)
    assert saved.read_bytes() == before


def test_names_that_stand_twice_are_refused(saved: Path, tmp_path: Path) -> None:
    raw = saved.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    table = json.loads(raw[8 : 8 + size])
    text = table["__metadata__"]["bantamweight"]
    table["__metadata__"]["bantamweight"] = '{"extra":{},' + text[1:]
    with pytest.raises(FormatError, match="a name stands twice in one object"):
        bw.load(write(tmp_path / "bad.safetensors", table, raw[8 + size :]), Net())
