"""quantize over whole models: data flow, forms of calibration data, selection, resume, bad input."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from bantamweight import GPFQ, RoundToNearest, quantize, quantize_
from bantamweight.errors import BantamweightError, CalibrationError, FormatError, UnsupportedLayerError
from bantamweight.nn import SimulatedConv2d, SimulatedLinear
from bantamweight.quantize import driver, preset
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

FAST = GPFQ(bits=4, steps=(0.7, 1.0))


class Residual(nn.Module):
    """Branches, in-place activations, a strided, a grouped and a depthwise convolution, a functional pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, groups=2)
        self.short = nn.Conv2d(8, 12, 1, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.depthwise(x).relu_()
        x = torch.relu(self.grouped(x) + self.short(x))
        return self.head(x.mean((2, 3)))


class Untraceable(Residual):
    """The same network behind a branch on values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.abs().max()) > 0 else x + 1)


@pytest.fixture
def model() -> Residual:
    torch.manual_seed(0)
    net = Residual()
    with torch.no_grad():  # statistics that folding must not lose
        net.stem[1].running_mean.normal_(0, 0.3)
        net.stem[1].running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(40, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_whole_model(model: Residual, images: Tensor):
    before = copy.deepcopy(model.state_dict())
    quantized = quantize(model, GPFQ(bits=4), calibration=images)
    report = quantized.quantization
    assert [layer.name for layer in report.layers] == ["stem.0", "depthwise", "grouped", "short", "head"]
    assert all(layer.scheme == "W4" and 0 < layer.error < 0.2 and layer.seconds > 0 for layer in report.layers)
    assert report.layers[2].shape == (12, 4, 3, 3)
    assert (report.mode, report.folded, report.skipped, report.samples) == (
        "one pass",
        ("stem.1",),
        (),
        40,
    )
    assert report.share == 1.0 and 0 < report.output_error < 0.15 and not report.notes
    assert isinstance(quantized.depthwise, SimulatedConv2d)
    assert isinstance(quantized.head, SimulatedLinear)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in quantized.modules())
    with torch.no_grad():
        error = (quantized(images) - model(images)).norm() / model(images).norm()
    assert float(error) < 0.15
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert "depthwise" in str(report)
    assert report.to_dict()["config"]["bits"] == 4


def test_follows_the_quantized_network_better_than_rounding(model: Residual, images: Tensor):
    def error(method) -> float:
        quantized = quantize(model, method, calibration=images)
        fresh = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            return float((quantized(fresh) - model(fresh)).norm())

    assert error(GPFQ(bits=3)) < 0.6 * error(RoundToNearest(bits=3))


def test_eight_bits_is_nearly_the_model(model: Residual, images: Tensor):
    for fold in (True, False):
        quantized = quantize(model, GPFQ(bits=8), calibration=images, fold_batchnorm=fold)
        assert torch.allclose(quantized(images), model(images), atol=0.02)
        assert any(isinstance(module, nn.BatchNorm2d) for module in quantized.modules()) is not fold


def test_replay_gives_the_same_as_one_pass(model: Residual, images: Tensor):
    untraceable = Untraceable()
    untraceable.load_state_dict(model.state_dict())
    by_pass = quantize(model, FAST, calibration=images)
    behind_a_branch = quantize(untraceable, FAST, calibration=images)
    short_of_memory = quantize(model, FAST, calibration=images, max_memory=1 << 17)
    assert by_pass.quantization.mode == behind_a_branch.quantization.mode == "one pass"
    assert behind_a_branch.quantization.folded == ("stem.1",)
    assert short_of_memory.quantization.mode == "replay"
    assert same_weights(by_pass, behind_a_branch)
    assert same_weights(by_pass, short_of_memory)


def test_every_network_runs_once(model: Residual):
    """However many layers there are: the cost is linear in depth without a trace."""
    calls = []

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            calls.append(float(x.sum()) > 0)  # which torch.fx cannot follow
            for layer in self.layers:
                x = torch.relu(layer(x))
            return x

    report = quantize(Counts(), FAST, calibration=[torch.randn(8, 6) for _ in range(3)]).quantization
    # Each of three batches: the survey and a pass through both networks. One of them: which layers are called at all,
    # and at the end float (twice) and quantized.
    assert len(report.layers) == 12 and len(calls) == 3 * 3 + 4


def test_networks_that_keep_state_on_themselves():
    """Batches that wait side by side do not see each other's state, and the model keeps none of theirs."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.register_buffer("mean", torch.zeros(6))
            self.kept, self.cache = None, {}

        def forward(self, x: Tensor) -> Tensor:
            self.kept = x.sum(1, keepdim=True)
            self.mean = self.mean * 0.9 + x.mean(0) * 0.1
            self.cache.setdefault("first", x.mean())
            return self.b(torch.relu(self.a(x))) * self.kept + self.mean + self.cache["first"]

    torch.manual_seed(0)
    model, batches = Keeps().eval(), [torch.randn(16, 6) + shift for shift in range(4)]
    kept = copy.deepcopy(model)
    quantized = quantize(model, GPFQ(bits=8), calibration=batches)
    assert quantized.kept is None and not quantized.cache and torch.equal(quantized.mean, torch.zeros(6))
    assert all(report.error < 0.02 for report in quantized.quantization.layers)
    with torch.no_grad():
        assert float((quantized(batches[2]) - kept(batches[2])).norm() / kept(batches[2]).norm()) < 0.02


def test_batches_that_call_layers_in_another_order():
    class Routes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 5:
                return self.c(x)
            first, second = (self.a, self.b) if float(x[0, 0]) > 0 else (self.b, self.a)
            return self.c(second(torch.relu(first(x))))

    torch.manual_seed(0)
    up, down = torch.randn(8, 6), torch.randn(8, 6)
    up[0, 0], down[0, 0] = 1.0, -1.0
    model = Routes().eval()
    report = quantize(model, GPFQ(bits=8), calibration=[up, torch.randn(5, 6), down]).quantization
    assert sorted(layer.name for layer in report.layers) == ["a", "b", "c"]
    assert all(layer.error < 0.02 for layer in report.layers)


def test_layers_that_get_other_rows_in_the_quantized_network():
    class Routes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 3, bias=False)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            chosen, y = self.router(x).argmax(-1), torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                y[chosen == index] = expert(x[chosen == index])
            return y

    torch.manual_seed(0)
    model, x = Routes().eval(), torch.randn(300, 8)
    coarse = {"router": RoundToNearest(levels=3)}  # which sends many rows to other experts
    quantized = quantize(model, GPFQ(bits=8), calibration=[x], overrides=coarse)
    assert [layer.name for layer in quantized.quantization.layers][1:] == [f"experts.{i}" for i in range(3)]
    assert all(layer.error < 0.02 for layer in quantized.quantization.layers[1:])
    for expert, original in zip(quantized.experts, model.experts, strict=True):
        assert float((expert.weight - original.weight).norm() / original.weight.norm()) < 0.02


def test_who_holds_a_layer_holds_the_quantized_one(images: Tensor):
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(10, 10), nn.Linear(10, 10)
            self.steps, self.named = [self.a, self.b], {"b": self.b}
            self.a.register_forward_hook(lambda module, args, y: y * 2)
            self.b.register_forward_pre_hook(lambda module, args: (args[0] - 1,))

        def forward(self, x: Tensor) -> Tensor:
            for step in self.steps:
                x = torch.tanh(step(x))
            return self.named["b"](x)

    torch.manual_seed(0)
    model = Held().eval()
    quantized = quantize(model, GPFQ(bits=8), calibration=images)
    assert quantized.steps == [quantized.a, quantized.b] and isinstance(quantized.named["b"], SimulatedLinear)
    with torch.no_grad():
        expected = model(images)
        assert float((quantized(images) - expected).norm() / expected.norm()) < 0.05
        head = model.steps[0]
        quantize_(model, GPFQ(bits=8), calibration=images)
        assert head is model.a and isinstance(head, SimulatedLinear)
        assert torch.equal(model(images), quantized(images))


def test_a_copy_that_runs_the_model_itself_is_refused(images: Tensor):
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU())
    inner = model[0]
    model.forward = lambda x: inner(x).relu()  # type: ignore[method-assign]
    with pytest.raises(BantamweightError, match=r"calls layer '0' of the model itself, through a\s+closure"):
        quantize(model, FAST, calibration=images)
    compiled = nn.Sequential(nn.Linear(10, 10), nn.ReLU())
    compiled.forward = torch.compile(compiled.forward, backend="eager")  # type: ignore[method-assign]
    for each in (compiled, torch.compile(nn.Sequential(nn.Linear(10, 10)), backend="eager")):
        assert isinstance(quantize(each, FAST, calibration=images)[0], SimulatedLinear)


def test_models_that_cannot_be_worked_on():
    class Locked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(10, 10)
            self.lock = threading.Lock()

    x = torch.randn(8, 10)
    quantized = quantize(nn.Sequential(nn.Linear(10, 4)), FAST, calibration=x)
    for model, sentence in (
        (nn.Sequential(Locked()), r"attribute '0\.lock' \(a lock\)"),
        (nn.Linear(10, 4, device="meta"), "'weight' of the model is on the meta device"),
        (nn.Sequential(nn.LazyLinear(4)), "'0.weight' of the model is not initialized"),
        (torch.jit.trace(nn.Linear(10, 4), x), "a script whose layers are fixed"),
        (quantized, "quantized already"),
        (lambda x: x, "model is a function"),
    ):
        with pytest.raises(BantamweightError, match=sentence):
            quantize(model, FAST, calibration=x)


def test_a_tensor_with_a_graph_is_detached_in_the_copy(images: Tensor):
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = nn.Linear(10, 4), []

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.layer(x)
            self.seen.append(self.last)
            return self.last

    model = Last()
    model(images)
    quantized = quantize(model, FAST, calibration=images)
    assert quantized.last.grad_fn is None and model.last.grad_fn is not None and len(model.seen) == 1


def test_forms_of_calibration_data(model: Residual, images: Tensor):
    expected = quantize(model, FAST, calibration=images)
    labels = torch.zeros(len(images))
    loader = DataLoader(TensorDataset(images, labels), batch_size=64)

    def forward_loop(network: nn.Module) -> None:
        network(images)

    for calibration in ([images], loader, [(images, labels)], [[images, labels]], [{"x": images}], forward_loop):
        assert same_weights(quantize(model, FAST, calibration=calibration), expected)


def test_calibration_tensors_are_not_changed(images: Tensor):
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.mul_(2))

    kept = images.clone()
    quantize(Changes(), FAST, calibration=images)
    assert torch.equal(images, kept)


def test_in_place_gives_the_same(model: Residual, images: Tensor):
    expected = quantize(model, FAST, calibration=images)
    returned = quantize_(model, FAST, calibration=images)
    assert returned is model
    assert same_weights(model, expected)
    assert torch.equal(model(images), expected(images))
    assert len(model.quantization.layers) == 5
    bare = nn.Linear(3, 3)
    assert quantize_(bare, FAST, calibration=torch.randn(4, 3)) is bare and isinstance(bare, SimulatedLinear)


def test_a_bare_layer(images: Tensor):
    layer = nn.Linear(10, 6)
    quantized = quantize(layer, GPFQ(bits=8), calibration=images)
    assert isinstance(quantized, SimulatedLinear)
    assert torch.allclose(quantized(images), layer(images), atol=0.03)


def test_selection(model: Residual, images: Tensor):
    quantized = quantize(
        model,
        FAST,
        calibration=images,
        ignore=["stem", r".*wise"],
        overrides={"gr.*": GPFQ(bits=3, group_size=8), "short": None},
    )
    report = quantized.quantization
    assert [(layer.name, layer.scheme) for layer in report.layers] == [("grouped", "W3-g8"), ("head", "W4")]
    assert {layer.name: layer.reason for layer in report.skipped} == {
        "stem.0": "ignored by 'stem'",
        "depthwise": "ignored by '.*wise'",
        "short": "left in float by the override 'short'",
    }
    only = quantize(model, FAST, calibration=images, layers=["head"]).quantization
    assert [layer.name for layer in only.layers] == ["head"]
    for argument in ({"ignore": ["haed"]}, {"overrides": {"haed": FAST}}, {"layers": ["haed"]}):
        with pytest.raises(BantamweightError, match="'haed', which fits no layer"):
            quantize(model, FAST, calibration=images, **argument)
    with pytest.raises(BantamweightError, match="regular expression"):
        quantize(model, FAST, calibration=images, ignore=["(head"])
    with pytest.raises(BantamweightError, match="left to quantize"):
        quantize(model, FAST, calibration=images, ignore=[".*"])


def test_weights_that_are_left_are_named():
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.weight.sum()

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 10, 10))
            self.scale = nn.Parameter(torch.ones(4, 10))
            self.mixed, self.own, self.odd = nn.Linear(10, 10), Own(10, 10), Odd(10, 10)
            self.norm = nn.LayerNorm((4, 10))

        def forward(self, x: Tensor) -> Tensor:
            return self.odd(self.own(self.norm(self.mixed(x @ self.w[0])) * self.scale))

    x = torch.randn(20, 4, 10)
    quantized = quantize(Experts(), FAST, calibration=x)
    report = quantized.quantization
    assert [layer.name for layer in report.layers] == ["w_layers.0", "mixed", "own.inner"]
    assert [(layer.name, layer.weights) for layer in report.skipped] == [
        ("scale", 40),
        ("odd", 100),
        ("w_layers.1", 100),
    ]
    assert report.weights == 540 and report.share == 300 / 540 and "55.6% of 540 weights" in str(report)
    assert "its forward computes with it in another way" in report.skipped[1].reason
    with pytest.raises(UnsupportedLayerError, match="layer 'w' is a Experts"):
        quantize(Experts(), FAST, calibration=x, strict=True)
    with pytest.raises(UnsupportedLayerError, match=r"layer 'own' is a Own, .* was not observed"):
        quantize(Experts(), FAST, calibration=x, strict=True, ignore=["w", "scale"])
    quantize(Experts(), FAST, calibration=x, strict=True, ignore=["w", "scale", "own", "odd"])


def test_a_batchnorm_that_does_more_is_folded_and_a_kept_one_named(images: Tensor):
    class Acts(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(super().forward(x))

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), Acts(8), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 3, groups=2), nn.BatchNorm2d(4)
    )
    for norm in (model[1], model[2], model[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 4)
    report = (quantized := quantize(model, GPFQ(bits=8), calibration=images)).quantization
    assert report.folded == ("1", "4") and list(report.kept_batchnorms) == ["2"] and "2  " in str(report)
    with torch.no_grad():
        assert float((quantized(images) - model.eval()(images)).norm() / model(images).norm()) < 0.02


def test_layers_never_reached_and_layers_shared():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(6, 6)
            self.alias = self.used
            self.spare = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(torch.relu(self.used(x)))

    quantized = quantize(Odd(), FAST, calibration=torch.randn(30, 6))
    assert [layer.name for layer in quantized.quantization.layers] == ["used"]
    assert "calibrated on all of its 2 calls a pass" in quantized.quantization.layers[0].notes
    assert [(layer.name, layer.reason) for layer in quantized.quantization.skipped] == [
        ("spare", "the calibration data never reaches it")
    ]
    assert quantized.alias is quantized.used
    assert isinstance(quantized.used, SimulatedLinear)
    assert isinstance(quantized.spare, nn.Linear)


def test_layers_of_other_kinds_are_quantized_through_plain_ones():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0).eval()
    tokens = torch.randn(12, 7, 16)
    quantized = quantize(layer, GPFQ(bits=8), calibration=tokens)
    parts = ["query", "key", "value", "out_proj"]
    assert [layer.name for layer in quantized.quantization.layers] == [
        *(f"self_attn.{part}" for part in parts),
        "linear1",
        "linear2",
    ]
    assert quantized.quantization.share == 1.0 and quantized.prepared == {"self_attn": {"kind": "multihead_attention"}}
    with torch.no_grad():
        assert torch.allclose(layer(tokens), quantized(tokens), atol=0.05)
    partly = quantize(layer, FAST, calibration=tokens, ignore=["self_attn"]).quantization
    assert [layer.name for layer in partly.layers] == ["linear1", "linear2"]
    assert [layer.name for layer in partly.skipped] == ["self_attn.in_proj_weight", "self_attn.out_proj"]
    odd = nn.Sequential(nn.ConvTranspose1d(4, 4, 3, stride=2, dilation=2), nn.Conv1d(4, 3, 2))
    report = quantize(odd, FAST, calibration=torch.randn(20, 4, 10)).quantization
    assert [layer.name for layer in report.layers] == ["1.conv"]
    assert [layer.name for layer in report.skipped] == ["0"] and "dilation" in report.skipped[0].reason


def test_weights_made_anew_at_every_call_are_settled_first(images: Tensor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 4)).eval()
    model[1].running_mean.normal_()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    model[3] = nn.utils.parametrizations.weight_norm(model[3])
    quantized = quantize(model, GPFQ(bits=8), calibration=images)
    assert quantized.quantization.folded == ("1",) and set(quantized.prepared) == {"0.weight", "3.weight"}
    with torch.no_grad():
        assert float((quantized(images) - model(images)).norm() / model(images).norm()) < 0.02


def test_forms_of_batches():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, a: Tensor, b: Tensor, scale: Tensor | None = None) -> Tensor:
            return self.layer(a + b if scale is None else (a + b) * scale)

    class Any(Two):
        def forward(self, *inputs: Tensor) -> Tensor:  # type: ignore[override]
            return self.layer(sum(inputs))

    torch.manual_seed(0)
    a, b, labels, model = torch.randn(64, 8), torch.randn(64, 8), torch.zeros(64).long(), Two().eval()
    expected = quantize(model, FAST, calibration=[(a, b)])
    for calibration in ([(a, b)], [((a, b), labels)], [{"a": a, "b": b}], [({"a": a, "b": b}, labels)]):
        assert same_weights(quantize(model, FAST, calibration=calibration), expected)
        wrapped = quantize(nn.DataParallel(model), FAST, calibration=calibration)
        assert same_weights(wrapped.module, expected)
    several = Any()
    several.load_state_dict(model.state_dict())
    assert same_weights(quantize(several, FAST, calibration=[(a, b)]), expected)
    with pytest.warns(UserWarning, match="1 more tensors than .* If they are its scale, pass dicts"):
        quantize(model, FAST, calibration=[(a, b, labels)])
    with pytest.raises(CalibrationError, match="does not run on calibration batch 1"):
        quantize(model, FAST, calibration=[(a, b), (a, b[:, :3])])


def test_patches_are_those_the_convolution_sees():
    """With one patch a kernel position, X W must be the convolution's own output, for every setting of it."""
    torch.manual_seed(0)
    for options in (
        {"kernel_size": 3},
        {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2)},
        {"kernel_size": 3, "padding": "same", "dilation": (1, 2)},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 2, "padding": 1, "padding_mode": "circular", "groups": 2},
        {"kernel_size": 1, "stride": 3, "groups": 4},
    ):
        conv = nn.Conv2d(4, 8, **options)
        x = torch.randn(5, 4, 9, 8)
        config = GPFQ(bits=8, patches_per_layer=10**6, held_out=0.2)
        problem = driver.build_problem("conv", conv, [(x, x, torch.tensor([0, 0, 1, 0, 0]).bool())], 1000, config)
        outputs = problem.held_out_outputs().transpose(1, 2).reshape(8, -1).T
        with torch.no_grad():
            expected = (conv(x[2:3]) - conv.bias[:, None, None])[0].flatten(1).T
        assert torch.allclose(outputs, expected, atol=1e-5), options
        assert problem.rows == 4 * len(expected)


def test_patches_per_layer_limits_the_rows(images: Tensor):
    conv = nn.Conv2d(3, 4, 3)
    flags = torch.arange(40) % 5 == 0
    config = GPFQ(patches_per_layer=500)
    problem = driver.build_problem("conv", conv, [(images, images, flags)], 40 * 64, config)
    assert problem.rows + problem.held_out.shape[1] == 500


def test_resume_goes_on_where_it_was(model: Residual, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = quantize(model, FAST, calibration=images)
    solve, calls = GPFQ.quantize_layer, []

    def killed_at_the_third(self, problem, bias):
        calls.append(problem.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return solve(self, problem, bias)

    monkeypatch.setattr(GPFQ, "quantize_layer", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, FAST, calibration=images, resume=tmp_path / "run")
    resumed = quantize(model, FAST, calibration=images, resume=tmp_path / "run")
    assert calls == ["stem.0", "depthwise", "grouped", "grouped", "short", "head"]
    assert same_weights(resumed, expected)
    assert [layer.seconds > 0 for layer in resumed.quantization.layers] == [False, False, True, True, True]
    assert [layer.error for layer in resumed.quantization.layers] == [
        layer.error for layer in expected.quantization.layers
    ]
    assert not list((tmp_path / "run").glob("*.unfinished"))


def test_resume_refuses_another_run(model: Residual, images: Tensor, tmp_path: Path):
    quantize(model, FAST, calibration=images, resume=tmp_path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.weight[0, 0] += 1
    for change in (
        lambda: quantize(model, GPFQ(bits=3), calibration=images, resume=tmp_path),
        lambda: quantize(other, FAST, calibration=images, resume=tmp_path),
        lambda: quantize(model, FAST, calibration=images + 1, resume=tmp_path),
    ):
        with pytest.raises(FormatError, match="other settings, weights or calibration data"):
            change()
    victim = next(tmp_path.glob("head*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:50])
    with pytest.raises(FormatError, match="damaged"):
        quantize(model, FAST, calibration=images, resume=tmp_path)


def test_resume_folder_that_cannot_be_made(model: Residual, images: Tensor, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BantamweightError, match="cannot be made"):
        quantize(model, FAST, calibration=images, resume=tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("calibration", "sentence"),
    [
        ([], "empty"),
        (torch.empty(0, 3, 10, 10), "empty"),
        ({"x": torch.zeros(1)}, "dict batch in a list"),
        (3, "calibration is a int"),
        (["text"], "batch is a str"),
        ([{"y": torch.zeros(2, 3, 10, 10)}], "no 'x'|'y'"),
        (torch.full((8, 3, 10, 10), float("nan")), "'stem.0' in the network hold NaN"),
    ],
)
def test_bad_calibration_data(model: Residual, calibration: object, sentence: str):
    with pytest.raises(CalibrationError, match=sentence):
        quantize(model, FAST, calibration=calibration)


def test_bad_weights_and_configs(model: Residual, images: Tensor):
    with pytest.raises(BantamweightError, match="config is a int"):
        quantize(model, 4, calibration=images)
    with pytest.raises(BantamweightError, match="no preset"):
        quantize(model, "W5", calibration=images)
    with torch.no_grad():
        model.grouped.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(BantamweightError, match="weight of layer 'grouped' holds NaN"):
        quantize(model, FAST, calibration=images)


def test_one_sample_is_enough(model: Residual, images: Tensor):
    report = quantize(model, FAST, calibration=images[:1]).quantization
    assert len(report.layers) == 5


def test_a_bfloat16_model_stays_one(model: Residual, images: Tensor):
    model = model.to(torch.bfloat16)
    for config in (FAST, GPFQ(bits=8, bias_correction=False)):
        quantized = quantize(model, config, calibration=images.to(torch.bfloat16))
        assert quantized(images.to(torch.bfloat16)).dtype == torch.bfloat16


def test_models_of_keyword_arguments_and_structured_outputs():
    class Structured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.layer = nn.Linear(16, 8)

        def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
            hidden = self.layer(input=self.embed(ids))
            return {"hidden": hidden if mask is None else hidden * mask[..., None]}

    batches = [{"ids": torch.randint(0, 20, (6, 5)), "mask": torch.ones(6, 5)} for _ in range(3)]
    report = quantize(Structured(), FAST, calibration=batches).quantization
    assert [layer.name for layer in report.layers] == ["layer"]
    assert [layer.name for layer in report.skipped] == ["embed"]


def test_presets():
    assert preset("ternary") == GPFQ(bits=2, levels=3)
    assert preset("W4A8-g128") == GPFQ(bits=4, activation_bits=8, group_size=128)
    assert preset("W3") == GPFQ(bits=3)


def test_int8_activations_are_simulated_as_calibrated(model: Residual, images: Tensor):
    quantized = quantize(model, GPFQ(bits=4, activation_bits=8), calibration=images)
    assert all(layer.activation_bits == 8 for layer in quantized.modules() if isinstance(layer, SimulatedConv2d))
    with torch.no_grad():
        assert float((quantized(images) - model(images)).norm() / model(images).norm()) < 0.15
