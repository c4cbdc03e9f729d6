"""Beacon: its descent against brute force, groups and shared scales, dead inputs, the guard, whole networks."""

import itertools
import json

import pytest
import torch
from bantamweight import GPFQ, Beacon, RoundToNearest, pack, quantize
from bantamweight.errors import BantamweightError
from bantamweight.quantize import LayerwiseMethod, cosine_descent
from bantamweight.quantize.cosine_descent import best_of_all, shared_scale_descent
from bantamweight.quantize.grid import Grid, alphabet
from bantamweight.quantize.layer_problem import LayerProblem, ProblemBuilder
from torch import Tensor, nn


def make_problem(
    *, d: int, neurons: int, rows: int, problems: int = 1, dead: tuple[int, ...] = (), seed: int = 0
) -> LayerProblem:
    """A layer behind a ReLU layer, float and slightly off; the inputs in `dead` are zero in all rows."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(problems, rows + rows // 4 + 1, d, generator=generator)
    before = torch.randn(problems, d, d, generator=generator)
    x = (z @ before).relu()
    x_tilde = (z @ (before + 0.15 * torch.randn(before.shape, generator=generator))).relu()
    x[:, :, list(dead)] = x_tilde[:, :, list(dead)] = 0
    builder = ProblemBuilder("layer", torch.randn(problems, d, neurons, generator=generator))
    builder.add(x[:, :rows], x_tilde[:, :rows], held_out=False)
    builder.add(x[:, rows:], x_tilde[:, rows:], held_out=True)
    return builder.finish()


def grid_of(problem: LayerProblem, levels: int, *, zero: float | None = None, group_size: int | None = None) -> Grid:
    size = group_size or problem.inputs
    shape = (problem.weight.shape[0], -(-problem.inputs // size), problem.neurons)
    return Grid(
        scale=torch.full(shape, 2.0 / levels),
        zero=torch.full(shape, (levels - 1) / 2 if zero is None else zero),
        levels=levels,
        group_size=size,
    )


def start_of(problem: LayerProblem, grid: Grid) -> Tensor:
    ones = Grid(scale=torch.ones_like(grid.scale), zero=grid.zero, levels=grid.levels, group_size=grid.group_size)
    return ones.values(grid.nearest(problem.weight))


def errors_of(problem: LayerProblem, grid: Grid, codes: Tensor) -> Tensor:
    """||X w - X~ q||^2 less ||X w||^2, of every column, in float64."""
    cross, gram = (matrix.double() for matrix in problem.matrices(centered=False))
    q = grid.values(codes).double()
    return (q * (gram @ q)).sum(1) - 2 * (q * (cross @ problem.weight.double())).sum(1)


def test_json_round_trip():
    config = Beacon(bits=3, group_size=32, steps=(0.9, 0.5), start="greedy", sweeps=2, damping=0.2)
    assert LayerwiseMethod.from_json(config.to_json()) == config == Beacon.from_json(config.to_json())
    with pytest.raises(BantamweightError, match="the config is for method 'gpfq'"):
        Beacon.from_json(GPFQ().to_json())
    with pytest.raises(BantamweightError, match="unknown settings refine"):
        Beacon.from_json(json.dumps({**json.loads(config.to_json()), "refine": None}))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"start": "random"}, "start is 'random'.*aligned, greedy, nearest"),
        ({"order": "random"}, "order is 'random'"),
        ({"sweeps": 0}, "sweeps is 0"),
        ({"sweeps": True}, "sweeps is True"),
        ({"sweeps": 1.5}, "sweeps is 1.5"),
        ({"damping": -0.1}, "damping is -0.1"),
        ({"damping": float("nan")}, "damping is nan"),
        ({"bits": 5}, "bits is 5"),
        ({"start": "greedy", "rows_per_scale": 4}, "start is 'greedy'.*aligned"),
        ({"start": "greedy", "granularity": "layer"}, "start is 'greedy'.*aligned"),
    ],
)
def test_settings_out_of_range(settings: dict, sentence: str):
    with pytest.raises(BantamweightError, match=sentence):
        Beacon(**settings)


@pytest.mark.parametrize(("levels", "zero"), [(3, 1.0), (4, 1.5), (4, 1.0), (4, 2.0)])
def test_best_of_all_is_what_brute_force_finds(levels: int, zero: float):
    problem = make_problem(d=5, neurons=4, rows=60, problems=2)
    cross, gram = problem.matrices(centered=False)
    found = best_of_all(cross @ problem.weight, gram, levels, zero)
    assert found is not None
    scale, codes = found
    combinations = torch.tensor(list(itertools.product(range(levels), repeat=5))).double() - zero
    for p, n in itertools.product(range(2), range(4)):
        target = cross[p].double() @ problem.weight[p, :, n].double()
        s, r = combinations @ target, ((combinations @ gram[p].double()) * combinations).sum(1)
        least = float((-s.clamp_min(0).square() / r.clamp_min(1e-9)).min())
        q = (codes[p, :, n].double() - zero) * scale[p, 0, n]
        assert float(q @ gram[p].double() @ q - 2 * q @ target) == pytest.approx(least, rel=1e-4)
    assert best_of_all(torch.zeros(1, 19, 1), torch.eye(19)[None], 2, 0.5) is None


@pytest.mark.parametrize("zero", [1.0, 1.5, 2.0])
def test_no_single_change_betters_what_the_descent_ends_at(zero: float):
    problem = make_problem(d=7, neurons=6, rows=80)
    cross, gram = problem.matrices(centered=False)
    grid = grid_of(problem, 4, zero=zero)
    grid, codes = cosine_descent.cosine_descent(cross @ problem.weight, gram, grid, start_of(problem, grid), sweeps=50)
    target = (cross @ problem.weight)[0].double()

    def squared_cosine(steps: Tensor) -> Tensor:
        s, r = (steps * target).sum(0), (steps * (gram[0].double() @ steps)).sum(0)
        return s * s.abs() / r.clamp_min(1e-9)

    steps = codes[0].double() - zero
    reached = squared_cosine(steps)
    for t, level in itertools.product(range(7), range(4)):
        other = steps.clone()
        other[t] = level - zero
        assert bool((squared_cosine(other) <= reached * (1 + 1e-5)).all())
    assert torch.allclose(-reached, errors_of(problem, grid, codes)[0], rtol=1e-4)  # the scale is the best one


@pytest.mark.parametrize("group_size", [None, 50])
@pytest.mark.parametrize("levels", [3, 4, 15, 255])
def test_more_sweeps_never_make_the_error_larger(levels: int, group_size: int | None):
    problem = make_problem(d=132, neurons=3, rows=300)  # more than a block of inputs
    cross, gram = problem.matrices(centered=False)
    grid = grid_of(problem, levels, group_size=group_size)
    order = torch.argsort(problem.norms(), descending=True)
    before = errors_of(problem, grid, grid.nearest(problem.weight))
    power = float((problem.weight * (cross @ problem.weight)).sum())
    for sweeps in (1, 2, 3):
        found, codes = cosine_descent.cosine_descent(
            cross @ problem.weight, gram, grid, start_of(problem, grid), order=order, sweeps=sweeps
        )
        after = errors_of(problem, found, codes)
        assert bool((after <= before + 1e-6 * power).all())
        before = after
    assert bool((found.scale > 0).all()) and int(codes.max()) < levels


def test_many_levels_choose_as_if_all_were_tried(monkeypatch: pytest.MonkeyPatch):
    problem = make_problem(d=40, neurons=30, rows=100)
    cross, gram = problem.matrices(centered=False)
    grid = grid_of(problem, 15)
    arguments = (cross @ problem.weight, gram, grid, start_of(problem, grid))
    few = cosine_descent.cosine_descent(*arguments, sweeps=1)
    monkeypatch.setattr(cosine_descent, "_FEW_LEVELS", 15)
    every = cosine_descent.cosine_descent(*arguments, sweeps=1)
    assert float((few[1] != every[1]).float().mean()) < 0.01  # ties and float rounding
    assert float(errors_of(problem, *few).sum()) == pytest.approx(float(errors_of(problem, *every).sum()), rel=1e-3)


def test_each_group_has_the_scale_that_fits_best():
    problem = make_problem(d=50, neurons=4, rows=300)
    cross, gram = problem.matrices(centered=False)
    grid = grid_of(problem, 7, group_size=16)
    grid, codes = cosine_descent.cosine_descent(cross @ problem.weight, gram, grid, start_of(problem, grid), sweeps=100)
    least = errors_of(problem, grid, codes)
    for group, factor in itertools.product(range(4), (0.98, 1.02)):
        scale = grid.scale.clone()
        scale[:, group] *= factor
        other = Grid(scale=scale, zero=grid.zero, levels=7, group_size=16)
        assert bool((errors_of(problem, other, codes) > least).all())


@pytest.mark.parametrize("rows_per_scale", [None, 3])
def test_shared_scales_stay_shared_and_never_make_the_error_larger(rows_per_scale: int | None):
    problem = make_problem(d=40, neurons=7, rows=200, problems=2)
    matrices = problem.matrices(centered=False)
    grid = grid_of(problem, 3)
    start = grid.nearest(problem.weight)
    before = float(errors_of(problem, grid, start).sum())
    for sweeps in (1, 2, 4):
        found, codes = shared_scale_descent(
            problem.weight, *matrices, grid, start, rows_per_scale=rows_per_scale, sweeps=sweeps
        )
        after = float(errors_of(problem, found, codes).sum())
        assert after <= before + 1e-6 * abs(before)
        before = after
    distinct = {tuple(part.flatten().tolist()) for part in found.scale.split(rows_per_scale or 7, dim=2)}
    for part in (found.scale.flatten(0, 1) if rows_per_scale else found.scale.reshape(1, -1)).split(3, dim=-1):
        assert bool((part == part[..., :1]).all())
    assert distinct


@pytest.mark.parametrize(
    "settings",
    [{}, {"group_size": 16}, {"rows_per_scale": 4}, {"granularity": "layer"}, {"start": "greedy"}, {"bits": 4},
     {"bits": 2, "levels": None}, {"bits": 2, "levels": None, "granularity": "layer"}],
)  # fmt: skip
def test_no_neuron_is_worse_than_nearest_on_held_out_rows(settings: dict):
    settings = {"levels": 3 if "bits" not in settings else None, **settings}
    # Fewer rows than inputs: what fits the calibration data need not fit others.
    problem = make_problem(d=48, neurons=10, rows=30)
    scale_settings = {key: value for key, value in settings.items() if key != "start"}
    steps = (0.25, 0.35, 0.45, 0.55, 0.65, 0.8, 1.0)
    ours = Beacon(**settings, steps=steps).quantize_layer(problem, None)
    nearest = RoundToNearest(**scale_settings, steps=steps, bias_correction=True).quantize_layer(problem, None)
    assert ours.error <= nearest.error * (1 + 1e-5)
    if "rows_per_scale" not in settings and "granularity" not in settings:
        held, held_tilde = problem.held_out[0], problem.held_out_quantized[0]

        def errors(result) -> Tensor:
            return (held @ problem.weight[0] - held_tilde @ result.weight.dequantize().T - result.bias).square().sum(0)

        assert bool((errors(ours) <= errors(nearest) * (1 + 1e-4)).all())


def test_better_than_gpfq_with_its_refinements_on_held_out_rows():
    problem = make_problem(d=64, neurons=40, rows=2000)
    for settings in ({"levels": 3}, {"bits": 2}, {"bits": 3}):
        gpfq = GPFQ(**settings).quantize_layer(problem, None)
        assert Beacon(**settings).quantize_layer(problem, None).error < gpfq.error


@pytest.mark.parametrize("d", [6, 40])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_dead_inputs_keep_a_rounded_weight(d: int, damping: float):
    problem = make_problem(d=d, neurons=5, rows=200, dead=(1, 4))
    result = Beacon(bits=3, damping=damping, centered=False).quantize_layer(problem, None)
    weight, q = problem.weight[0].T, result.weight.dequantize()
    step = result.weight.scale
    inside = weight.abs() <= 3 * step
    assert bool(((q - weight).abs() <= 0.5001 * step)[:, [1, 4]][inside[:, [1, 4]]].all())
    silent = Beacon(bits=3, damping=damping).quantize_layer(
        make_problem(d=d, neurons=5, rows=200, dead=tuple(range(d))), None
    )
    assert silent.error == 0 and bool(torch.isfinite(silent.weight.dequantize()).all())


def test_the_same_every_time():
    for settings in ({"levels": 3}, {"bits": 2, "group_size": 16}, {"bits": 4, "rows_per_scale": 3}):
        first, second = (
            Beacon(**settings).quantize_layer(make_problem(d=40, neurons=7, rows=120), None) for _ in range(2)
        )
        assert torch.equal(first.weight.codes, second.weight.codes)
        assert torch.equal(first.weight.scale, second.weight.scale)


def test_zero_points_of_two_bits_are_each_tried():
    assert alphabet(2, None, None).zeros == (1.0, 2.0, 1.5)
    result = Beacon(bits=2).quantize_layer(make_problem(d=30, neurons=40, rows=300), None)
    assert len(set(result.weight.zero.flatten().tolist())) > 1


@torch.no_grad()
def test_whole_networks_with_depthwise_and_grouped_convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 4, 5),
    ).eval()  # fmt: skip
    x = torch.randn(64, 3, 8, 8)
    for settings in ({"levels": 3}, {"bits": 4}):
        simulated = quantize(net, Beacon(**settings, activation_bits=8), calibration=x, progress=False)
        depthwise = {layer.name: layer.error for layer in simulated.quantization.layers}["3"]
        plain = quantize(net, GPFQ(**settings, activation_bits=8), calibration=x, progress=False)
        assert depthwise < 1.1 * {layer.name: layer.error for layer in plain.quantization.layers}["3"]
        assert torch.allclose(pack(simulated)(x), simulated(x), atol=1e-3, rtol=1e-3)
