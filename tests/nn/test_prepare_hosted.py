"""Modules with a forward of their own: what they hand to a product is computed by a child, and nothing else changes."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bantamweight as bw
import pytest
import torch
from bantamweight.errors import FormatError
from bantamweight.nn.prepare import prepare, prepare_like
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class SameConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class PaddedConv(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input * 2, weight, bias)


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (2, 0)), self.weight, bias=self.bias, dilation=self.dilation, groups=self.groups)


class Lora(nn.Linear):
    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self.a, self.b = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias) + self.b(self.a(x))


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3


class LateBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + 2 * self.bias


class ScaledTable(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 4


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))
        self.position = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x + self.position, self.w)


IMAGE, SERIES, ROWS = (2, 3, 8, 8), (2, 3, 9), (3, 6)
HOSTED: list[tuple[Callable[[], nn.Module], tuple[int, ...], str]] = [
    (lambda: SameConv(3, 4, 3, stride=2), IMAGE, "inner"),
    (lambda: SameConv(3, 6, 3, dilation=2, groups=3, bias=False), IMAGE, "inner"),
    (lambda: PaddedConv(3, 4, 3, padding="same"), IMAGE, "inner"),
    (lambda: PaddedConv(3, 4, 3, padding=1, padding_mode="reflect"), IMAGE, "inner"),
    (lambda: Causal(3, 6, 3, groups=3), SERIES, "inner"),
    (lambda: Lora(6, 4), ROWS, "inner"),
    (lambda: Lora(6, 4, bias=False), ROWS, "inner"),
    (lambda: Scaled(6, 4), ROWS, "inner"),
    (lambda: LateBias(6, 4), ROWS, "inner"),
    (Bare, ROWS, "w_layer"),
]


@pytest.mark.parametrize(("make", "shape", "child"), HOSTED)
@torch.no_grad()
def test_hosted(make: Callable[[], nn.Module], shape: tuple[int, ...], child: str) -> None:
    module, x = make().eval(), torch.randn(shape)
    twin, expected, weights = copy.deepcopy(module), module(x), dict(module.named_parameters())
    kind, seen = type(module), []
    found = prepare(module, run=lambda module: module(x))
    assert set(found.records) == {""} and not found.left and isinstance(module, kind)
    getattr(module, child).register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(module(x), expected)
    assert seen == [1]
    getattr(module, child)._forward_hooks.clear()
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in weights.values())
    for name, weight in weights.items():
        if "." not in name:
            held: Any = getattr(module, name)
            assert held.shape == weight.shape and held.dtype == weight.dtype and held.device == weight.device
            torch.testing.assert_close(held * 1, weight.data)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), expected)
    with torch.device("meta"):
        meta = make()
    for fresh in (twin, meta):
        prepare_like(fresh, found.records)
        fresh.load_state_dict(module.state_dict(), assign=True)
        torch.testing.assert_close(fresh.eval()(x), expected)
    assert not prepare(module, run=lambda module: module(x)).records
    module.bfloat16()
    assert module(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_a_network_of_them_quantizes_and_packs() -> None:
    net = nn.Sequential(SameConv(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), Lora(128, 16), LateBias(16, 16)).eval()
    net.append(Scaled(16, 4))
    x = torch.randn(64, 3, 8, 8)
    expected = net(x)
    prepare(net, run=lambda net: net(x))
    small = bw.quantize(net, bw.GPFQ(bits=8), calibration=x, progress=False)
    names = {"0.inner", "3.inner", "3.a", "3.b", "4.inner", "5.inner"}
    assert {layer.name for layer in small.quantization.layers} == names
    packed = bw.pack(small)
    assert {record.name for record in packed.packing.layers if record.kernel} == names
    for form in (small, packed, copy.deepcopy(packed)):
        assert float((form(x) - expected).norm() / expected.norm()) < 0.05
    assert packed[3].weight.shape == (16, 128) and packed[3].weight.dtype == torch.float32


@torch.no_grad()
def test_a_table_with_a_scale_keeps_its_tie() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = ScaledTable(20, 8, padding_idx=1), nn.Linear(8, 20, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.words(ids))

    net, ids = Language().eval(), torch.randint(0, 20, (3, 4))
    expected = net(ids)
    prepare(net, run=lambda net: net(ids))
    torch.testing.assert_close(net(ids), expected)
    assert net.words.inner.weight is net.head.weight and net.words.inner.padding_idx == 1
    torch.testing.assert_close(F.linear(net.words(ids), net.words.weight), expected)  # read from outside


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Twofold(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.weight.sum()


class BothWays(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight), self.weight.T)


class Moody(nn.Conv2d):
    """Its stride depends on the input: seen once, it is served in float when it differs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, stride=1 if x.shape[-1] < 10 else 2)


@torch.no_grad()
def test_what_does_not_suit_is_left_with_a_reason() -> None:
    for module, x, match in (
        (Standardized(3, 4, 3), torch.randn(IMAGE), "hands it to no product"),
        (Twofold(6, 4), torch.randn(ROWS), "in another way too"),
        (BothWays(6, 4), torch.randn(ROWS), "in several ways"),
    ):
        expected, kind = module(x), type(module)
        found = prepare(module, run=lambda module, x=x: module(x))
        assert not found.records and match in found.left[""] and type(module) is kind
        assert torch.equal(module(x), expected) and isinstance(module.weight, nn.Parameter)
    net = nn.Sequential(Scaled(6, 4), Scaled(6, 4))
    assert all("pass run" in reason for reason in prepare(net).left.values())
    found = prepare(net, run=lambda net: net[0](torch.randn(ROWS)), skip=lambda name: name == "0")
    assert found.left == {"1": "the data never reaches it"} and type(net[0]) is Scaled

    def fails(net: nn.Module) -> None:
        net[0](torch.randn(ROWS))
        raise KeyError("no data")

    found = prepare(net, run=fails)
    assert "cannot be observed (KeyError" in found.left["0"] and type(net[0]) is Scaled
    assert "observing" not in vars(net[0])


@torch.no_grad()
def test_one_odd_module_does_not_cost_the_others_their_child() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            if type(self.w) is not nn.Parameter:
                raise TypeError("only parameters, please")
            return x @ self.w

    net = nn.Sequential(Picky(), Scaled(4, 4))
    x = torch.randn(ROWS)
    expected = net(x)
    assert set(prepare(net, run=lambda net: net(x)).records) == {"1"}
    torch.testing.assert_close(net(x), expected)


@torch.no_grad()
def test_another_use_than_the_one_seen_is_served_in_float() -> None:
    reference = Moody(3, 4, 3).eval()
    module = copy.deepcopy(reference)
    prepare(module, run=lambda module: module(torch.randn(1, 3, 8, 8)))
    small = bw.quantize(module, bw.GPFQ(bits=8), calibration=torch.randn(8, 3, 8, 8), progress=False)
    for form in (module, small):
        for size in (8, 12):
            x = torch.randn(1, 3, size, size)
            torch.testing.assert_close(form(x), reference(x), atol=0.02, rtol=0.02)


def test_gradients_reach_the_children() -> None:
    module = Lora(6, 4)
    prepare(module, run=lambda module: module(torch.randn(ROWS)))
    module(torch.randn(ROWS)).sum().backward()
    assert module.inner.weight.grad is not None and module.inner.bias.grad is not None


def test_a_tracer_is_told() -> None:
    module = nn.Sequential(Scaled(6, 4))
    prepare(module, run=lambda module: module(torch.randn(ROWS)))
    with pytest.raises(torch.fx.proxy.TraceError, match="PreparedScaled"):
        torch.fx.symbolic_trace(module)


class Experts(nn.Module):
    """Three experts in one parameter, multiplied in the ways that models do."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.up = nn.Parameter(
            torch.randn(3, 4, 8) if way in ("linear", "iterate", "grouped") else torch.randn(3, 8, 4)
        )
        self.shift = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:  # [experts, rows, 8]
        each = list(zip(torch.arange(3), x, strict=True))
        if self.way == "linear":
            return torch.stack([F.linear(rows, self.up[i], self.shift[i]) for i, rows in each])
        if self.way == "iterate":
            return torch.stack([rows @ w.T for w, rows in zip(self.up, x, strict=True)])
        if self.way == "matmul":
            return torch.stack([rows @ self.up[int(i)] for i, rows in each])
        if self.way == "bmm":
            return torch.bmm(x, self.up)
        if self.way == "einsum":
            return torch.einsum("eni,eio->eno", x, self.up)
        ends = torch.tensor([64, 64, 190], dtype=torch.int32)
        return F.grouped_mm(x.flatten(0, 1)[:190], self.up.transpose(-2, -1), offs=ends)


WAYS = ["linear", "iterate", "matmul", "bmm", "einsum", "grouped"]


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_experts(way: str) -> None:
    if way == "grouped" and not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    module, x = Experts(way), torch.randn(3, 64, 8)
    twin, expected, weight = copy.deepcopy(module), module(x), module.up.data
    found = prepare(module, run=lambda module: module(x))
    assert set(found.records) == {""} and not found.left
    assert [name for name, _ in module.named_parameters() if "up" in name] == [
        f"up_layers.{i}.weight" for i in range(3)
    ]
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module.up + 0, weight)
    prepare_like(twin, found.records)
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(copy.deepcopy(twin)(x), expected)
    small = bw.quantize(module, bw.GPFQ(bits=8), calibration=[x], progress=False)
    reached = {"up_layers.0", "up_layers.2", *([] if way == "grouped" else ["up_layers.1"])}
    assert {layer.name for layer in small.quantization.layers} == reached
    for form in (small, bw.pack(small)):
        assert float((form(x) - expected).norm() / expected.norm()) < 0.05


@torch.no_grad()
def test_experts_that_are_gathered_stay() -> None:
    class Gathered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.up[torch.tensor([2, 0])])

    module = Gathered()
    found = prepare(module, run=lambda module: module(torch.randn(2, 4, 6)))
    assert not found.records and found.left == {
        "up": "its own forward hands it to no product or lookup that a child computes"
    }


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"op": "fft"}, "computes fft is unknown"),
        ({"bias": "gain"}, "no parameter gain"),
        ({"op": "conv2d", "geometry": {"stride": [1, 1]}}, "none of a conv2d"),
        ({"experts": 3}, "is no 3 experts"),
        ({"geometry": 5}, "does not fit it"),
        ({"more": 5}, "does not fit it"),
    ],
)
def test_records_that_do_not_fit_are_refused(change: dict[str, Any], match: str) -> None:
    module = nn.Sequential(Scaled(6, 4))
    use = {"op": "linear", "experts": None, "transposed": False, "bias": "bias", "geometry": {}}
    with pytest.raises(FormatError, match=match):
        prepare_like(module, {"0": {"kind": "hosted", "uses": {"weight": {**use, **change}}}})
    for record in ({"kind": "hosted"}, {"kind": "hosted", "uses": {"other": use}}, {"kind": "hosted", "uses": 3}):
        with pytest.raises(FormatError, match="'0'"):
            prepare_like(module, {"0": record})
    assert type(module[0]) is Scaled


@torch.no_grad()
def test_layers_whose_weights_another_forward_reads() -> None:
    """As torchvision's Swin: a block hands its layers' weights to a function, and calls none of them."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj, self.spare = nn.Linear(4, 12), nn.Linear(12, 4, bias=False), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(torch.tanh(F.linear(x, self.qkv.weight, self.qkv.bias)), self.proj.weight)

    net, x = Reads(), torch.randn(3, 4)
    expected = net(x)
    found = prepare(net, run=lambda net: net(x))
    assert set(found.records) == {"qkv", "proj"} and not found.left and type(net.spare) is nn.Linear
    assert torch.equal(net(x), expected) and isinstance(net.qkv, nn.Linear)
    with called(net.qkv.inner) as calls:
        net(x)
    assert calls == [1]
    fresh = Reads()
    prepare_like(fresh, found.records)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x), expected)
    small = bw.quantize(Reads(), bw.RoundToNearest(bits=8), calibration=[x], progress=False)
    assert [layer.name for layer in small.quantization.layers] == ["qkv.inner", "proj.inner"]


@contextmanager
def called(module: nn.Module) -> Iterator[list[int]]:
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()
