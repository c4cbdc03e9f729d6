"""A fused network is the packed one with another forward: what it is, holds and answers stays."""

import copy
import io
from collections.abc import Callable
from typing import Any

import bantamweight as bw
import pytest
import torch
from bantamweight.errors import BantamweightError
from bantamweight.nn import fuse
from bantamweight.nn.conv_fusion import convolution_chains
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.names = ["cat", "dog"]

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def embed(self, x: Tensor) -> Tensor:
        return self.forward(x).mean((2, 3))

    def first(self, x: Tensor) -> Tensor:
        return self.a(x)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 3, 16, 16)


def packed(net: nn.Module, x: Tensor) -> Any:
    return bw.pack(bw.quantize(net.eval(), bw.RoundToNearest(bits=4), calibration=x, progress=False))


def fused_to(model: Any, *names: str) -> Any:
    fused: Any = fuse(model)
    assert fused.fusion.names == list(names), str(fused.fusion)
    return fused


# ---- the module stays what it is ----------------------------------------------------------------


def test_class_methods_attributes_hooks_and_names_stay(x: Tensor) -> None:
    model = packed(Net(), x)
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    fused = fused_to(model, "a", "b")
    assert type(fused) is Net and fused.names == ["cat", "dog"]
    torch.testing.assert_close(fused.embed(x), model.embed(x))  # means over maps of another memory order
    assert torch.equal(fused.first(x), model.first(x))
    assert list(fused.state_dict()) == list(model.state_dict())
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in model.named_modules()]
    calls.clear()
    assert torch.equal(fused(x), model(x)) and calls == ["model", "model"]


def test_a_sequential_keeps_its_length(x: Tensor) -> None:
    model = packed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), x)
    fused = fused_to(model, "0", "2")
    assert len(fused) == 3 and torch.equal(fused[2](fused[1](fused[0](x))), model(x))


def test_copies_run_on_their_own_layers(x: Tensor) -> None:
    fused = fused_to(packed(Net(), x), "a", "b")
    copied = copy.deepcopy(fused)
    assert copied.forward.__self__ is copied and copied.conv_chain_0.convolutions[0] is copied.a
    expected = fused(x)
    copied.a.bias = copied.a.bias + 1  # type: ignore[operator]
    assert torch.equal(fused(x), expected) and not torch.equal(copied(x), expected)


def test_pickled_it_is_the_packed_model(x: Tensor) -> None:
    model = packed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), x)
    file = io.BytesIO()
    torch.save(fused_to(model, "0", "2"), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


def test_graphs(x: Tensor) -> None:
    model = packed(Net(), x)
    fused = fused_to(model, "a", "b")
    with torch.no_grad():
        assert torch.equal(torch.compile(fused, backend="eager", fullgraph=True)(x), model(x))
        for strict in (False, True):
            assert torch.equal(torch.export.export(fused, (x,), strict=strict).module()(x), model(x))


def test_a_layer_put_in_place_of_a_fused_one_is_not_passed_over(x: Tensor) -> None:
    def put_another(model: Any) -> None:
        model[2] = nn.Conv2d(4, 4, 3)

    def take_away(model: Any) -> None:
        del model[2]

    model = packed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), x)
    for change in (put_another, take_away):
        for called in (False, True):
            fused = fused_to(model, "0", "2")
            copied = copy.deepcopy(fused)
            if called:
                fused(x)
            change(fused)
            with pytest.raises(BantamweightError, match="layer '2' of a fused model is another one"):
                fused(x)
            assert torch.equal(copied(x), model(x))


# ---- other calls --------------------------------------------------------------------------------


class Optional(Net):
    def forward(
        self, x: Tensor, skip: Tensor | None = None, scale: int = 2, *rest: int, flag: bool = False, **more: int
    ):
        y = self.body(x)
        y = y * 3 if skip is None else y + skip
        y = -y if flag else y
        for factor in (*rest, *more.values()):
            y = y * factor
        return y * scale


@pytest.mark.parametrize(
    ("args", "kwargs", "recorded"),
    [
        ((), {}, True),
        ((None,), {}, True),
        ((None, 2), {"flag": False}, True),
        ((torch.ones(8, 1, 1),), {}, False),
        ((), {"skip": torch.ones(8, 1, 1)}, False),
        ((None, 3), {}, False),
        ((None, True), {}, False),
        ((None, 2, 5), {}, False),
        ((), {"flag": True}, False),
        ((), {"other": 7}, False),
    ],
)
def test_optional_arguments(x: Tensor, args: Any, kwargs: Any, recorded: bool) -> None:
    model = packed(Optional(), x)
    fused = fused_to(model, "a", "b")
    chain, calls = fused.conv_chain_0, []
    chain.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(fused(x, *args, **kwargs), model(x, *args, **kwargs))
    assert len(calls) == recorded


def test_bad_calls_are_refused_as_before(x: Tensor) -> None:
    fused = fused_to(packed(Optional(), x), "a", "b")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        fused()
    with pytest.raises(TypeError, match="multiple values"):
        fused(x, x=x)


class Keywords(Net):
    def forward(self, x: Tensor, /, *, gain: Tensor, training: bool | None = None) -> Tensor:
        return self.body(x) * gain


def test_positional_and_keyword_only_arguments(x: Tensor) -> None:
    gain = torch.tensor(3.0)
    net = Keywords()
    model = bw.pack(
        bw.quantize(net.eval(), bw.RoundToNearest(bits=4), calibration=lambda m: m(x, gain=gain), progress=False)
    )
    fused = fused_to(model, "a", "b")
    assert torch.equal(fused(x, gain=gain), model(x, gain=gain))


def test_another_mode_runs_the_models_own_forward(x: Tensor) -> None:
    class Mode(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * (5 if self.training else 1)

    model = packed(Mode(), x)
    fused = fused_to(model, "a", "b")
    assert torch.equal(fused.train()(x), model.train()(x))
    assert torch.equal(fused.eval()(x), model.eval()(x))


def test_a_dropout_that_is_woken_is_refused(x: Tensor) -> None:
    model = packed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Conv2d(4, 4, 3)), x)
    fused = fused_to(model, "0", "2")
    fused[1].train()
    with pytest.raises(BantamweightError, match="a dropout inside a fused chain"):
        fused(x)


# ---- what tracing sees once ---------------------------------------------------------------------


class BranchOnSize(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * 2 if x.shape[0] > 1 else self.body(x)


class SizeInATry(Net):
    def forward(self, x: Tensor) -> Tensor:
        try:
            factor = int(x.shape[0])
        except TypeError:
            factor = 1
        return self.body(x) * factor


class AskingForTheType(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x if isinstance(x, Tensor) else x * 2)


class Counting(Net):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x) * self.calls


class CountingInABuffer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x) * self.calls


class KeepingItsOutput(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.body(x)
        return self.last


class CollectingOutputs(Net):
    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, list[Tensor]] = {"all": []}

    def forward(self, x: Tensor) -> Tensor:
        self.outputs["all"].append(self.body(x))
        return self.outputs["all"][-1]


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (BranchOnSize, "cannot trace its forward"),
        (SizeInATry, "gives other outputs than its own"),
        (AskingForTheType, "gives other outputs than its own"),
        (Counting, "writes to its calls"),
        (CountingInABuffer, "writes to its"),
        (KeepingItsOutput, "writes to its last"),
        (CollectingOutputs, "writes to its outputs"),
    ],
)
def test_a_forward_that_a_graph_cannot_stand_for_stays(
    x: Tensor, build: Callable[[], nn.Module], reason: str, calibrated: bool
) -> None:
    model = packed(build(), x)
    if calibrated:
        with pytest.raises(BantamweightError, match=f"this {build.__name__} has no chain .*{reason}"):
            fuse(model, calibration=x)
        return
    fused = fused_to(model)
    assert reason in str(fused.fusion) and not convolution_chains(fused)
    for images in (x, x[:1], x):
        assert torch.equal(fused(images), model(images))


class Caching(Net):
    """Whatever it keeps is made of weights or of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.grid = nn.Parameter(torch.randn(8)), None
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = str(x.device)
        if key not in self.cache:
            self.cache[key] = self.table * 2
        if self.grid is None:
            self.grid = torch.arange(8.0)
        bias = self.cache[key] + self.grid + torch.tensor([1.0, 2.0] * 4)
        return self.body(x) * bias.view(1, 8, 1, 1)


def test_caches_and_constants(x: Tensor) -> None:
    model = packed(Caching(), x)
    model.cache.clear()
    for _ in range(2):  # empty, and filled
        fused = fused_to(model, "a", "b")
        assert list(fused.cache) == list(model.cache)
        assert torch.equal(fused(x), model(x)) and torch.equal(copy.deepcopy(fused)(x), model(x))


class Scaled(Net):
    scale: Any = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale


def test_a_proxy_of_another_tracing_is_refused(x: Tensor) -> None:
    model = packed(Scaled(), x)
    tracer = torch.fx.Tracer()
    tracer.graph = torch.fx.Graph()
    model.scale = tracer.create_proxy("placeholder", "x", (), {})
    assert "cannot trace" in str(fused_to(model).fusion)


# ---- which layers are in chains -----------------------------------------------------------------


class Twice(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.body(x)) + self.b(self.a(x)))


def test_layers_that_are_called_twice(x: Tensor) -> None:
    model = packed(Twice(), x)
    fused = fused_to(model, "a", "b", "block.0")
    assert torch.equal(fused(x), model(x))


class Wrapper(nn.Module):
    """A way that torch.fx cannot follow, around one that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.net = self.same = Optional()

    def forward(self, x: Tensor) -> Tensor:
        return self.same(self.net(x)[:, :3]) if float(x.sum()) < 1e9 else x


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_part_of_a_model(x: Tensor, calibrated: bool) -> None:
    model = packed(Wrapper(), x)
    fused: Any = fuse(model, calibration=x if calibrated else None)
    assert fused.fusion.names == ["net.a", "net.b"], str(fused.fusion)
    assert float((fused(x) - model(x)).norm()) <= (0.1 if calibrated else 0) * float(model(x).norm())


def test_layers_with_hooks_stay_outside(x: Tensor) -> None:
    model = packed(nn.Sequential(Net(), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()), x)
    calls: list[int] = []
    for index in (0, 4):
        model[index].register_forward_hook(lambda *_, index=index: calls.append(index))
    fused = fused_to(model, "1", "3", "0.a", "0.b")
    calls.clear()
    assert torch.equal(fused(x), model(x)) and calls == [0, 4, 0, 4]


def test_a_forward_put_on_the_object_is_not_passed_over(x: Tensor) -> None:
    model = packed(Net(), x)
    model.forward = lambda x: 2 * model.body(x)
    assert "replaced on the object" in str(fused_to(model).fusion)


def test_a_modules_name_does_not_say_what_it_is(x: Tensor) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.add, self.relu = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.LeakyReLU(0.5)
            self.flatten, self.mean = nn.Softmax(1), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.flatten(self.mean(self.relu(self.add(self.relu(self.a(x))))))

    model = packed(Named(), x)
    assert torch.equal(fused_to(model)(x), model(x))
