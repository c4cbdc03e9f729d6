import itertools
import json

import bantamweight as bw
import numpy as np
import pytest
import torch
from bantamweight.curvature import LayerSensitivity, Sensitivity, sensitivity
from bantamweight.curvature.result import Conditions
from bantamweight.errors import BantamweightError
from bantamweight.quantize import RoundToNearest, quantize
from bantamweight.quantize.plan import plan
from torch import nn
from torch.nn import functional

CHOICES = (2, 3, 4, 8)


def made_up(seed, layers=6):
    """A sensitivity with random scores and sizes; rounding errors fall about fourfold a bit, as they do."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(layers):
        out, width = int(random.integers(1, 70)), int(random.integers(1, 300))
        errors = {b: float(random.uniform(0.5, 2) * 4.0 ** (2 - b)) for b in CHOICES}
        errors = dict(zip(CHOICES, sorted(errors.values(), reverse=True), strict=True))
        rows.append(
            LayerSensitivity(
                name=f"layer{i}",
                layers=(f"layer{i}",),
                shapes=((out, width),),
                weights=out * width,
                macs=int(random.integers(1, 10**6)),
                values=(1.0,),
                score=float(10.0 ** random.uniform(-4, 3)),
                errors=errors,
            )
        )
    conditions = Conditions(
        mode="eval", differentiation="double_backward", samples=1, batches=1, parameters=1, blocks=("all",), loss=1.0
    )
    return Sensitivity(
        metric="lambda_max", per="layer", layers=tuple(rows), group_size=None, subsets=1, samples=1, products=0,
        converged=True, conditions=conditions,
    )  # fmt: skip


def brute_force(s, budgets, ties=(), fixed=None):
    """The least loss increase over every assignment that meets the budgets, each evaluated through the plan's own
    report of what one assignment needs."""
    best = np.inf
    names = [layer.name for layer in s.layers]
    total = sum(layer.weights for layer in s.layers)
    for bits in itertools.product(CHOICES, repeat=len(names)):
        chosen = dict(zip(names, bits, strict=True))
        if any(len({chosen[name] for name in tie}) > 1 for tie in ties):
            continue
        if any(chosen[name] != b for name, b in (fixed or {}).items()):
            continue
        used = {
            "average_bits": sum(layer.weights * b for layer, b in zip(s.layers, bits, strict=True)) / total,
            "max_bops": sum(layer.macs * b * 8 for layer, b in zip(s.layers, bits, strict=True)),
        }
        if all(used[name] <= limit * (1 + 1e-12) for name, limit in budgets.items()):
            best = min(best, sum(layer.loss_increase(b) for layer, b in zip(s.layers, bits, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("average_bits", [2.0, 2.7, 3.5, 8.0])
def test_the_optimum_equals_brute_force(seed, average_bits):
    s = made_up(seed)
    result = plan(s, average_bits=average_bits)
    assert result.loss_increase == pytest.approx(brute_force(s, {"average_bits": average_bits}), rel=1e-9)
    assert result.average_bits <= average_bits * (1 + 1e-9)
    assert result.used["average_bits"] == pytest.approx(result.average_bits)


@pytest.mark.parametrize("seed", range(4))
def test_several_budgets_ties_and_fixed_bits(seed):
    s = made_up(seed)
    ties, fixed = [("layer0", "layer3"), ("layer3", "layer4")], {"layer5": 8}
    budgets = {"average_bits": 4.5, "max_bops": 0.55 * sum(layer.macs * 64 for layer in s.layers)}
    expected = brute_force(s, budgets, ties, fixed)
    assert np.isfinite(expected)
    result = plan(s, **budgets, ties=ties, fixed=fixed)
    assert result.loss_increase == pytest.approx(expected, rel=1e-9)
    assert result.bits["layer0"] == result.bits["layer3"] == result.bits["layer4"] and result.bits["layer5"] == 8
    assert all(result.used[name] <= limit * (1 + 1e-9) for name, limit in budgets.items())


def test_latency_decides_where_it_is_the_budget():
    s = made_up(0, layers=3)
    latency = {layer.name: {2: 1.0, 3: 5.0, 4: 2.0, 8: 3.0} for layer in s.layers}
    result = plan(s, max_latency_ms=6.0, latency=latency)
    assert 3 not in result.bits.values()  # slower than 4 bits and less exact
    best = min(
        sum(layer.loss_increase(b) for layer, b in zip(s.layers, bits, strict=True))
        for bits in itertools.product(CHOICES, repeat=3)
        if sum(latency["layer0"][b] for b in bits) <= 6.0
    )
    assert result.loss_increase == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("group_size", [None, 16])
def test_bytes_are_those_of_the_quantized_model(group_size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 7)).eval()
    data = (torch.randn(20, 3, 8, 8), torch.randint(0, 7, (20,)))
    s = sensitivity(model, functional.cross_entropy, data, metric="ggn", subsets=1, group_size=group_size)
    for bits in CHOICES:
        result = plan(s, average_bits=8, fixed={"0": bits, "3": bits})
        config = RoundToNearest(bits=4, group_size=group_size)
        quantized = quantize(model, config, calibration=data[0], overrides=result.overrides(config), progress=False)
        sizes = {name: m.quantized.nbytes_on_disk for name, m in quantized.named_modules() if hasattr(m, "quantized")}
        assert {layer.name: layer.bytes for layer in result.layers} == sizes
        error = sum(
            float((m.quantized.dequantize() - bw.weights.conv_matrix(o.weight)).square().sum())
            if isinstance(o, nn.Conv2d)
            else float((m.quantized.dequantize() - o.weight).square().sum())
            for m, o in [(quantized[0], model[0]), (quantized[3], model[3])]
        )
        # At 2 bits quantize picks each row's zero point by the outputs, the sensitivity by the weights.
        estimated = sum(layer.errors[bits] for layer in s.layers)
        assert estimated <= error * 1.0001 and estimated == pytest.approx(error, rel=0.1 if bits == 2 else 1e-4)


def test_sharper_layers_get_more_bits():
    s = made_up(1)
    by_score = sorted(s.layers, key=lambda layer: layer.score)
    result = plan(s, average_bits=4)
    assert result.bits[by_score[-1].name] >= result.bits[by_score[0].name]
    assert len(set(result.bits.values())) > 1


def test_text_json_picture_and_lazy_name(tmp_path):
    result = bw.plan(made_up(2), average_bits=3.0)
    assert "bits on average" in str(result) and result.layers[0].name in str(result)
    loaded = json.loads(result.to_json(tmp_path / "plan.json"))
    assert loaded["budgets"] == {"average_bits": 3.0} and len(loaded["layers"]) == 6
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "needs a budget"),
        ({"average_bits": 1.5}, r"at least 2 bits a weight with choices \(2, 3, 4, 8\)"),
        ({"average_bits": 0}, "finite number above 0"),
        ({"average_bits": 3, "choices": (2, 5)}, r"rounding errors of \(2, 3, 4, 8\)"),
        ({"average_bits": 3, "ties": [("layer0", "nothing")]}, "ties names 'nothing'"),
        ({"average_bits": 3, "fixed": {"layer0": 5}}, "fixed gives layer0 5 bits"),
        ({"average_bits": 3, "fixed": {"layer0": 2, "layer1": 4}, "ties": [("layer0", "layer1")]}, "fixed to diff"),
        ({"max_latency_ms": 1.0}, "needs latency="),
        ({"max_latency_ms": 1.0, "latency": {"layer0": {2: 1.0}}}, "latency lacks layer0 at 3 bits"),
        ({"max_bytes": 10}, "max_bytes is 10"),
    ],
)
def test_bad_input_gets_a_sentence(arguments, words):
    with pytest.raises(BantamweightError, match=words):
        plan(made_up(0), **arguments)


def test_budgets_that_contradict_each_other():
    s = made_up(0, layers=2)
    latency = {layer.name: {2: 9.0, 3: 9.0, 4: 9.0, 8: 1.0} for layer in s.layers}
    with pytest.raises(BantamweightError, match="meets all the budgets together"):
        plan(s, average_bits=4, max_latency_ms=4, latency=latency)
