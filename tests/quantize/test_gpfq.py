"""GPFQ's config, and the quality of one layer: the paper's decay, the variants, the guard, the search."""

import json
import math

import pytest
import torch
from bantamweight import GPFQ, RoundToNearest
from bantamweight.errors import BantamweightError
from bantamweight.quantize import LayerwiseMethod
from bantamweight.quantize.grid import Grid
from bantamweight.quantize.layer_problem import LayerProblem, ProblemBuilder
from bantamweight.quantize.path_following import follow_gram
from torch import Tensor

PAPER = {"order": "natural", "damping": 0.0, "centered": False, "refine": None}


def make_problem(
    *, d: int, neurons: int, rows: int, keep_rows: bool = False, offset: float = 0.0, problems: int = 1, seed: int = 0
) -> tuple[LayerProblem, Tensor, Tensor]:
    """A layer behind a ReLU layer, float and slightly off; and its two streams [problems, rows, d]."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(problems, rows + rows // 4 + 1, max(d // 2, 1), generator=generator)
    before = torch.randn(problems, max(d // 2, 1), d, generator=generator)
    off = before + 0.15 * torch.randn(before.shape, generator=generator)
    x, x_tilde = (z @ before).relu() + offset, (z @ off).relu() + offset
    weight = torch.randn(problems, d, neurons, generator=generator) / d**0.5
    builder = ProblemBuilder("layer", weight, collect="rows" if keep_rows else "gram")
    half = rows // 2
    builder.add(x[:, :half], x_tilde[:, :half], held_out=False)
    builder.add(x[:, half:rows], x_tilde[:, half:rows], held_out=False)
    builder.add(x[:, rows:], x_tilde[:, rows:], held_out=True)
    return builder.finish(), x, x_tilde


def test_json_round_trip_and_versions():
    config = GPFQ(bits=3, group_size=32, steps=(0.9, 0.5), refine="aligned", variant="l1", penalty=0.2)
    assert LayerwiseMethod.from_json(config.to_json()) == config == GPFQ.from_json(config.to_json())
    assert config.steps == (0.5, 0.9)
    nearest = RoundToNearest(bits=8)
    assert LayerwiseMethod.from_json(nearest.to_json()) == nearest
    newer = {**json.loads(config.to_json()), "version": 2}
    with pytest.raises(BantamweightError, match=r"version 2.*upgrade"):
        GPFQ.from_json(json.dumps(newer))
    with pytest.raises(BantamweightError, match="unknown settings colour"):
        GPFQ.from_json(json.dumps({**json.loads(config.to_json()), "colour": 1}))
    for text in ("", "[]", "{}", '{"version": 1, "method": "none"}', nearest.to_json()):
        with pytest.raises(BantamweightError, match="the config"):
            GPFQ.from_json(text)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"bits": 5}, "bits is 5.*2, 3, 4 or 8"),
        ({"levels": 1}, "levels is 1"),
        ({"alphabet": "odd"}, "alphabet is 'odd'"),
        ({"group_size": 0}, "group_size is 0"),
        ({"granularity": "row"}, "granularity is 'row'"),
        ({"granularity": "group"}, "give a group_size"),
        ({"rows_per_scale": 0}, "rows_per_scale is 0"),
        ({"rows_per_scale": 6, "granularity": "layer"}, "which has one step for all rows"),
        ({"granularity": "layer", "group_size": 8}, "give a group_size"),
        ({"percentile": 0}, "percentile is 0"),
        ({"steps": ()}, "steps is"),
        ({"steps": (0.5, -1)}, "steps is"),
        ({"activation_bits": 4}, "activation_bits is 4"),
        ({"patches_per_layer": 1}, "patches_per_layer is 1"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"order": "random"}, "order is 'random'"),
        ({"variant": "l2"}, "variant is 'l2'"),
        ({"refine": "yes"}, "refine is 'yes'"),
        ({"damping": -1}, "damping is -1"),
        ({"penalty": 0.5}, "penalty is 0.5"),
        ({"sweeps": 0}, "sweeps is 0"),
    ],
)
def test_settings_out_of_range(settings: dict, sentence: str):
    with pytest.raises(BantamweightError, match=sentence):
        GPFQ(**settings)


def test_schemes():
    assert GPFQ(bits=4).scheme == "W4"
    assert GPFQ(levels=3, activation_bits=8).scheme == "ternaryA8"
    assert GPFQ(bits=2).grid_alphabet.levels == 4
    assert GPFQ(bits=2, alphabet="symmetric").grid_alphabet.levels == 3
    assert GPFQ(bits=4, alphabet="full").grid_alphabet.levels == 16


@pytest.mark.parametrize("keep_rows", [False, True])
def test_reported_error_is_the_held_out_error(keep_rows: bool):
    problem, x, x_tilde = make_problem(d=40, neurons=9, rows=300, keep_rows=keep_rows, offset=0.5)
    bias = torch.arange(9.0)
    result = GPFQ(bits=3).quantize_layer(problem, bias)
    q = result.weight.dequantize()
    held, held_tilde = x[0, 300:], x_tilde[0, 300:]
    reference = held @ problem.weight[0]
    error = reference + bias - held_tilde @ q.T - result.bias
    assert result.error == pytest.approx(float(error.norm() / reference.norm()), rel=1e-3)
    # Bias correction makes the mean error on the rows solved on zero.
    mean_error = (x[0, :300] @ problem.weight[0] + bias - x_tilde[0, :300] @ q.T - result.bias).mean(0)
    assert float(mean_error.abs().max()) < 1e-3
    uncorrected = GPFQ(bits=3, bias_correction=False).quantize_layer(problem, bias)
    assert torch.equal(uncorrected.bias, bias)
    assert result.error < uncorrected.error


def test_kept_rows_and_gram_matrices_give_the_same_codes():
    for settings in (PAPER, {"refine": None}, {}):
        a, b = (
            GPFQ(bits=3, **settings).quantize_layer(make_problem(d=60, neurons=20, rows=100, keep_rows=keep)[0], None)
            for keep in (False, True)
        )
        differ = (a.weight.codes != b.weight.codes).float().mean()
        assert float(differ) <= 5e-3  # float32 rounding may tip a code, and what follows it
        assert a.error == pytest.approx(b.error, rel=0.01)


def test_better_than_round_to_nearest_and_search_helps():
    problem, _, _ = make_problem(d=128, neurons=64, rows=1000)
    for bits in (2, 3, 4):
        nearest = (
            RoundToNearest(bits=bits, steps=(0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)).quantize_layer(problem, None).error
        )
        fixed = GPFQ(bits=bits, steps=(1.0,), **PAPER).quantize_layer(problem, None).error
        searched = GPFQ(bits=bits, **PAPER).quantize_layer(problem, None).error
        best = GPFQ(bits=bits).quantize_layer(problem, None).error
        assert searched < fixed
        assert searched < 0.9 * nearest
        assert best < searched


def test_layer_channel_and_group_steps():
    problem, _, _ = make_problem(d=64, neurons=24, rows=600)
    with torch.no_grad():
        problem.weight[:, :32] *= 4  # groups that differ
    by_layer = GPFQ(bits=3, granularity="layer").quantize_layer(problem, None)
    by_channel = GPFQ(bits=3).quantize_layer(problem, None)
    by_group = GPFQ(bits=3, group_size=32).quantize_layer(problem, None)
    assert len(by_layer.weight.scale.unique()) == 1
    assert by_layer.weight.scale.shape == by_channel.weight.scale.shape == (24, 1)
    assert by_group.weight.scale.shape == (24, 2)
    assert by_group.error < by_channel.error < by_layer.error


def test_one_step_a_layer_reaches_its_largest_weight_by_rounding_and_the_mean_by_gpfq():
    problem, _, _ = make_problem(d=64, neurons=24, rows=600)
    with torch.no_grad():
        problem.weight[:, :, 3] *= 4
    settings = {"bits": 3, "granularity": "layer", "steps": (1.0,)}
    nearest = RoundToNearest(**settings).quantize_layer(problem, None).weight
    largest = problem.weight[0].abs().amax(0)
    torch.testing.assert_close(nearest.scale, (largest.max() / 3).expand(24, 1))
    assert float((nearest.dequantize() - problem.weight[0].T).abs().max()) <= 0.5001 * float(nearest.scale[0])
    published = GPFQ(**settings).quantize_layer(problem, None).weight
    torch.testing.assert_close(published.scale, (largest.mean() / 3).expand(24, 1))


@pytest.mark.parametrize("config", [GPFQ, RoundToNearest])
@pytest.mark.parametrize("group_size", [None, 32])
def test_rows_that_share_a_step(config, group_size):
    problem, _, _ = make_problem(d=64, neurons=22, rows=600)
    with torch.no_grad():
        problem.weight[:, :, 6:12] *= 4  # groups of rows that differ
    steps = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    settings = {"bits": 4, "alphabet": "full", "steps": steps, "group_size": group_size}
    by_rows = config(rows_per_scale=6, **settings).quantize_layer(problem, None)
    by_channel = config(**settings).quantize_layer(problem, None)
    weight = by_rows.weight
    assert weight.scale.shape == (22, 1 if group_size is None else 2)
    for part in (weight.scale, weight.zero):
        for group in part.split(6):  # the last has four rows
            assert bool((group == group[0]).all())
    assert len(weight.scale[:, 0].unique()) > 1
    # The shared step is one of the candidates: C times the largest weight of the group.
    largest = problem.weight[0, : group_size or 64].abs().amax(0).split(6)[1].max()
    assert float((weight.scale[6, 0] / (largest / 7.5) - torch.tensor(steps)).abs().min()) < 1e-5
    layer_wise = config(bits=4, alphabet="full", steps=steps, granularity="layer").quantize_layer(problem, None)
    assert by_channel.error < by_rows.error < layer_wise.error


def test_rows_that_share_a_step_take_the_quantile_of_all_their_weights():
    problem, _, _ = make_problem(d=101, neurons=5, rows=300)
    weight = RoundToNearest(bits=4, percentile=0.9, rows_per_scale=3).quantize_layer(problem, None).weight
    for rows in (slice(0, 3), slice(3, 5)):
        expected = torch.quantile(problem.weight[0, :, rows].abs().flatten(), 0.9) / 7
        assert torch.allclose(weight.scale[rows, 0], expected)
    alone = RoundToNearest(bits=4, percentile=0.9, rows_per_scale=1).quantize_layer(problem, None).weight
    assert alone.equals(RoundToNearest(bits=4, percentile=0.9).quantize_layer(problem, None).weight)


def test_a_group_that_does_not_divide_the_inputs():
    problem, _, _ = make_problem(d=50, neurons=5, rows=300)
    weight = GPFQ(bits=4, group_size=16).quantize_layer(problem, None).weight
    assert weight.scale.shape == (5, 4)
    assert weight.group_size == 16


def test_percentile_sets_the_range():
    problem, _, _ = make_problem(d=101, neurons=4, rows=300)
    result = RoundToNearest(bits=4, percentile=0.9).quantize_layer(problem, None)
    expected = torch.quantile(problem.weight[0].abs(), 0.9, dim=0) / 7
    assert torch.allclose(result.weight.scale[:, 0], expected)


def test_channel_groups_are_independent_layers():
    together, _, _ = make_problem(d=18, neurons=4, rows=200, problems=3)
    result = GPFQ(bits=4, **PAPER).quantize_layer(together, None)
    assert result.weight.codes.shape == (12, 18)
    for index in range(3):
        part = slice(index, index + 1)
        alone = LayerProblem(
            name="layer",
            weight=together.weight[part],
            gram=together.gram[part],
            cross=together.cross[part],
            analog=None,
            quantized=None,
            mean=together.mean[part],
            mean_quantized=together.mean_quantized[part],
            held_out=together.held_out[part],
            held_out_quantized=together.held_out_quantized[part],
            rows=together.rows,
        )
        codes = GPFQ(bits=4, **PAPER).quantize_layer(alone, None).weight.codes
        assert torch.equal(result.weight.codes[4 * index : 4 * index + 4], codes)


def test_guard_keeps_plain_where_rows_are_few():
    few, _, _ = make_problem(d=80, neurons=10, rows=150)
    plain = GPFQ(bits=3, refine=None).quantize_layer(few, None)
    for refine in ("auto", "aligned", "coordinate_descent"):
        guarded = GPFQ(bits=3, refine=refine).quantize_layer(few, None)
        assert torch.equal(guarded.weight.codes, plain.weight.codes)
        assert "fewer than twice" in guarded.notes[0]


def test_refinements_pay_where_rows_are_many():
    many, _, _ = make_problem(d=80, neurons=40, rows=2000)
    plain = GPFQ(bits=3, refine=None).quantize_layer(many, None)
    for refine, at_most in (("coordinate_descent", 0.97), ("aligned", 0.95), ("auto", 0.95)):
        refined = GPFQ(bits=3, refine=refine).quantize_layer(many, None)
        assert refined.error < at_most * plain.error, refine
        assert "held-out error" in refined.notes[0]


def test_a_refinement_that_is_worse_on_held_out_data_is_dropped():
    problem, _, _ = make_problem(d=40, neurons=10, rows=400)
    # Held-out data on which nothing learned from the rows holds: the analog outputs of other inputs.
    worse = LayerProblem(
        **{
            **{name: getattr(problem, name) for name in LayerProblem.__dataclass_fields__},
            "held_out": torch.randn(1, 100, 40),
            "held_out_quantized": torch.randn(1, 100, 40) * torch.linspace(0.1, 2, 40),
        }
    )
    plain = GPFQ(bits=3, refine=None).quantize_layer(worse, None)
    for refine in ("coordinate_descent", "aligned", "auto"):
        assert GPFQ(bits=3, refine=refine).quantize_layer(worse, None).error <= plain.error * (1 + 1e-6)


def test_variants():
    problem, _, _ = make_problem(d=64, neurons=32, rows=500)
    plain = GPFQ(bits=3, refine=None).quantize_layer(problem, None)
    stochastic = GPFQ(bits=3, refine=None, variant="stochastic")
    first, again = (stochastic.quantize_layer(problem, None) for _ in range(2))
    other = GPFQ(bits=3, refine=None, variant="stochastic", seed=1).quantize_layer(problem, None)
    assert torch.equal(first.weight.codes, again.weight.codes)
    assert not torch.equal(first.weight.codes, other.weight.codes)
    assert not torch.equal(first.weight.codes, plain.weight.codes)
    zeros = (plain.weight.codes == 3).float().mean()
    for variant in ("l1", "l0"):
        sparse = GPFQ(bits=3, refine=None, variant=variant, penalty=0.9).quantize_layer(problem, None)
        assert float((sparse.weight.codes == 3).float().mean()) > float(zeros) + 0.1


def test_decay_of_the_error_is_the_papers():
    """m = 64 Gaussian inputs, K = 4: the squared relative error falls as m ln N0 / N0 in the width N0."""
    generator = torch.Generator().manual_seed(0)
    for width in (128, 512, 2048):
        x = torch.randn(64, width, generator=generator)
        weight = torch.rand(1, width, 64, generator=generator) * 2 - 1
        scale = torch.full((1, 1, 64), 1 / 4)
        grid = Grid(scale=scale, zero=torch.full_like(scale, 4.0), levels=9, group_size=width)
        gram = (x.T @ x)[None]
        values = grid.values(follow_gram(weight, gram, gram, grid))[0]
        error = float((x @ (weight[0] - values)).square().sum() / (x @ weight[0]).square().sum())
        assert 0.0015 < error * width / (64 * math.log(width)) < 0.0035


def test_zero_weights_zero_inputs_and_a_constant_input():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200, 10, generator=generator)
    x[..., 3] = 0
    x[..., 4] = 2.5
    weight = torch.randn(1, 10, 6, generator=generator)
    weight[..., 2] = 0
    builder = ProblemBuilder("layer", weight)
    builder.add(x[:, :150], x[:, :150], held_out=False)
    builder.add(x[:, 150:], x[:, 150:], held_out=True)
    problem = builder.finish()
    for settings in ({}, PAPER, {"bits": 2}, {"levels": 3}):
        result = GPFQ(**settings).quantize_layer(problem, None)
        q = result.weight.dequantize()
        assert bool(torch.isfinite(q).all())
        assert math.isfinite(result.error)
        assert float(q[2].abs().max()) < 1e-9
        # Inputs that were zero or constant throughout are not thrown away.
        assert float((q[:, 3] - weight[0, 3]).abs().max()) <= float(weight.abs().max())
        if result.weight.levels > 4:
            assert float(q[:, 3].abs().max()) > 0.1
            assert float(q[:, 4].abs().max()) > 0.1


@pytest.mark.parametrize("collect", ["gram", "rows"])
@pytest.mark.parametrize(
    ("weights", "inputs"), [(1e-13, 1.0), (1e30, 1e-22), (1e-25, 1e25), (3e-38, 1e30), (1e15, 1.0)]
)
def test_numbers_of_any_size(collect: str, weights: float, inputs: float):
    """The codes are those of the same problem in ordinary units, and so are error, weight and bias, scaled."""
    problem, x, x_tilde = make_problem(d=24, neurons=8, rows=200, offset=0.3, keep_rows=collect == "rows")
    expected = GPFQ(bits=4).quantize_layer(problem, torch.zeros(8))
    builder = ProblemBuilder("layer", problem.weight * weights, collect=collect)
    builder.add(x[:, :200] * inputs, x_tilde[:, :200] * inputs, held_out=False)
    builder.add(x[:, 200:] * inputs, x_tilde[:, 200:] * inputs, held_out=True)
    for config in (GPFQ(bits=4), RoundToNearest(bits=8, bias_correction=True)):
        result = config.quantize_layer(builder.finish(), torch.zeros(8))
        reference = expected if isinstance(config, GPFQ) else config.quantize_layer(problem, torch.zeros(8))
        assert result.error == pytest.approx(reference.error, rel=0.05)
        change = result.weight.dequantize() / weights - problem.weight[0].T
        assert float(change.norm() / problem.weight.norm()) < 0.2
        assert bool(torch.isfinite(result.bias).all())
        size = weights * inputs
        if isinstance(config, RoundToNearest) and 1e-30 < size < 1e30:
            assert torch.allclose(result.bias / size, reference.bias, rtol=1e-3, atol=1e-4)


def test_a_neuron_far_smaller_than_its_neighbours_keeps_its_weights():
    problem, _, _ = make_problem(d=24, neurons=8, rows=200)
    problem.weight[:, :, 3] *= 1e-24
    result = GPFQ(bits=8).quantize_layer(problem, None)
    row, expected = result.weight.dequantize()[3], problem.weight[0, :, 3]
    assert float((row * 1e24 - expected * 1e24).norm() / (expected * 1e24).norm()) < 0.02


@pytest.mark.parametrize("collect", ["gram", "rows"])
@pytest.mark.parametrize("settings", [{}, {"group_size": 16}, {"rows_per_scale": 4}, {"granularity": "layer"}])
def test_never_worse_than_nearest_on_held_out_rows(collect: str, settings: dict):
    """On few rows, where the path fits chance, and on many."""
    for rows in (9, 40, 400):
        problem, _, _ = make_problem(d=48, neurons=16, rows=rows, keep_rows=collect == "rows")
        for bits in (2, 4, 8):
            outputs = problem.held_out_outputs()

            def errors(config: GPFQ | RoundToNearest, problem=problem, outputs=outputs) -> Tensor:
                result = config.quantize_layer(problem, torch.zeros(16))
                mine = problem.held_out_quantized[0] @ result.weight.dequantize().T + result.bias
                return (outputs[0] - mine).square().sum(0)

            nearest = errors(RoundToNearest(bits=bits, bias_correction=True, **settings))
            followed = errors(GPFQ(bits=bits, **settings))
            if "rows_per_scale" in settings or "granularity" in settings:  # choices are shared
                assert float(followed.sum()) <= float(nearest.sum()) * 1.0001
            else:
                assert bool((followed <= nearest * 1.0001).all())


def test_without_a_signal_weights_are_rounded_to_nearest():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 9, 4, generator=generator)  # a grouped convolution whose second group saw only zeros
    x = torch.randn(3, 100, 9, generator=generator)
    x[1] = 0
    builder = ProblemBuilder("layer", weight)
    builder.add(x[:, :80], x[:, :80], held_out=False)
    builder.add(x[:, 80:], x[:, 80:], held_out=True)
    problem = builder.finish()
    result = GPFQ(bits=4).quantize_layer(problem, None)
    nearest = RoundToNearest(bits=4).quantize_layer(problem, None)
    assert torch.equal(result.weight.dequantize()[4:8], nearest.weight.dequantize()[4:8])
    assert not torch.equal(result.weight.dequantize()[:4], nearest.weight.dequantize()[:4])
    assert any("rounded to nearest: no smaller held-out error" in note for note in result.notes)
    few, _, _ = make_problem(d=24, neurons=8, rows=5)
    result = GPFQ(bits=4).quantize_layer(few, None)
    assert torch.equal(result.weight.codes, RoundToNearest(bits=4).quantize_layer(few, None).weight.codes)
    assert "5 rows of calibration data are too few" in result.notes[0]


def test_statistics_are_the_cheapest_that_serve():
    assert RoundToNearest().statistics(inputs=4096, neurons=4096, rows=10_000) == "means"
    assert GPFQ(bits=4).statistics(inputs=8192, neurons=16, rows=24_000) == "rows"
    assert GPFQ(bits=4).statistics(inputs=1152, neurons=256, rows=24_000) == "gram"
    problem, _, _ = make_problem(d=96, neurons=3, rows=800, keep_rows=True)
    notes = GPFQ(bits=3).quantize_layer(problem, None).notes
    assert "coordinate descent" in notes[0]


def test_a_large_layer_tries_all_steps_on_some_of_its_neurons(monkeypatch: pytest.MonkeyPatch):
    problem, _, _ = make_problem(d=64, neurons=48, rows=600)
    whole = GPFQ(bits=4, refine=None).quantize_layer(problem, None)
    monkeypatch.setattr("bantamweight.quantize.step_search._PILOT_WEIGHTS", 1)
    for bits in (2, 4):
        few = GPFQ(bits=bits, refine=None).quantize_layer(problem, None)
        assert few.weight.levels == (4 if bits == 2 else 15)
    assert few.error < 1.03 * whole.error


def test_all_inputs_zero_and_inputs_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 10, 6, generator=generator)
    for x in (torch.zeros(1, 100, 10), 1e4 + torch.randn(1, 100, 10, generator=generator)):
        builder = ProblemBuilder("layer", weight)
        builder.add(x[:, :80], x[:, :80], held_out=False)
        builder.add(x[:, 80:], x[:, 80:], held_out=True)
        for settings in ({}, {"damping": 0.0}, {"centered": False}):
            result = GPFQ(**settings).quantize_layer(builder.finish(), None)
            assert result.error < 0.01
            assert float((result.weight.dequantize() - weight[0].T).abs().max()) < 1.5
