"""The blocked forms against the recursion as the paper writes it, and every kernel variant against the reference."""

import pytest
import torch
from bantamweight import _C
from bantamweight.quantize.grid import Grid
from bantamweight.quantize.path_following import (
    Rounding,
    coordinate_descent,
    coordinate_descent_on_samples,
    follow_aligned,
    follow_gram,
    follow_samples,
    gram_is_cheaper,
    in_order,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

VARIANTS = [name for name, missing in _C.gpfq_variants() if not missing]


def streams(m: int, d: int, *, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated non-negative inputs, and the same after a slightly different layer."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(m, max(d // 2, 1), generator=generator, dtype=dtype)
    w = torch.randn(max(d // 2, 1), d, generator=generator, dtype=dtype)
    noise = torch.randn(w.shape, generator=generator, dtype=dtype)
    return (z @ w).relu(), (z @ (w + 0.15 * noise)).relu()


def weights(d: int, neurons: int, *, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(1, d, neurons, generator=torch.Generator().manual_seed(seed), dtype=dtype) / d**0.5


def grid_for(weight: Tensor, levels: int, *, group_size: int | None = None, factor: float = 0.7) -> Grid:
    group_size = group_size or weight.shape[1]
    reach = torch.stack([part.abs().amax(1) for part in weight.split(group_size, 1)], 1)
    scale = factor * reach / ((levels - 1) / 2)
    return Grid(scale=scale, zero=torch.full_like(scale, levels // 2), levels=levels, group_size=group_size)


def paper_recursion(
    weight: Tensor, x: Tensor, x_tilde: Tensor, grid: Grid, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """u += w_t X_t; q_t = Q(<u, X~_t> / ||X~_t||^2); u -= q_t X~_t, one input at a time. Codes and values [d, N]."""
    d, neurons = weight.shape
    codes = torch.zeros(d, neurons, dtype=torch.uint8)
    values = torch.zeros_like(weight)
    u = weight.new_zeros(x.shape[0], neurons)
    for t in range(d) if order is None else order.tolist():
        u += x[:, t, None] * weight[t]
        norm = x_tilde[:, t] @ x_tilde[:, t]
        z = (x_tilde[:, t] @ u) / norm if norm > 0 else weight[t]
        scale, zero = grid.scale[0, t // grid.group_size], grid.zero[0, t // grid.group_size]
        code = (z / scale + zero + 0.5).floor().clamp(0, grid.levels - 1)
        codes[t] = code.to(torch.uint8)
        values[t] = scale * (code - zero)
        u -= x_tilde[:, t, None] * values[t]
    return codes, values


def grams(x: Tensor, x_tilde: Tensor) -> tuple[Tensor, Tensor]:
    return (x_tilde.T @ x)[None], (x_tilde.T @ x_tilde)[None]


@pytest.mark.parametrize("levels", [3, 4, 15])
@pytest.mark.parametrize(("d", "neurons", "group_size"), [(1, 1, None), (5, 3, 2), (130, 33, 48), (300, 70, None)])
@pytest.mark.parametrize("ordered", [False, True])
def test_float64_codes_equal_the_recursion(levels: int, d: int, neurons: int, group_size: int | None, ordered: bool):
    x, x_tilde = streams(150, d, dtype=torch.float64)
    weight = weights(d, neurons, dtype=torch.float64)
    grid = grid_for(weight, levels, group_size=group_size)
    order = torch.argsort(x_tilde.square().sum(0), descending=True, stable=True) if ordered else None
    expected, _ = paper_recursion(weight[0], x, x_tilde, grid, order)
    gram_codes = follow_gram(weight, *grams(x, x_tilde), grid, order=order)
    sample_codes = follow_samples(weight, *in_order(x[None], x_tilde[None], order), grid, order=order)
    assert torch.equal(gram_codes[0], expected)
    assert torch.equal(sample_codes[0], expected)


def test_float32_flips_few_codes():
    x, x_tilde = streams(1024, 400, dtype=torch.float64)
    weight = weights(400, 256, dtype=torch.float64)
    grid = grid_for(weight, 15)
    expected, _ = paper_recursion(weight[0], x, x_tilde, grid)
    grid32 = Grid(scale=grid.scale.float(), zero=grid.zero.float(), levels=15, group_size=400)
    x, x_tilde, weight = x.float(), x_tilde.float(), weight.float()
    for codes in (
        follow_gram(weight, *grams(x, x_tilde), grid32),
        follow_samples(weight, x[None], x_tilde[None], grid32),
    ):
        assert (codes[0] != expected).float().mean() <= 5e-4


def test_problems_are_independent():
    parts = [
        (streams(90, 70, dtype=torch.float64, seed=s), weights(70, 9, dtype=torch.float64, seed=s)) for s in (3, 4)
    ]
    weight = torch.cat([w for _, w in parts])
    cross, gram = (torch.cat(part) for part in zip(*[grams(*xs) for xs, _ in parts], strict=True))
    grid = grid_for(weight, 7)
    codes = follow_gram(weight, cross, gram, grid)
    for index, ((x, x_tilde), w) in enumerate(parts):
        alone, _ = paper_recursion(w[0], x, x_tilde, grid_for(w, 7))
        assert torch.equal(codes[index], alone)


def test_candidates_share_a_neuron():
    x, x_tilde = streams(90, 70, dtype=torch.float64)
    weight = weights(70, 9, dtype=torch.float64)
    grids = [grid_for(weight, 7, factor=factor) for factor in (0.5, 1.0)]
    both = Grid(
        scale=torch.cat([g.scale for g in grids], 2),
        zero=torch.cat([g.zero for g in grids], 2),
        levels=7,
        group_size=70,
    )
    for codes in (follow_gram(weight, *grams(x, x_tilde), both), follow_samples(weight, x[None], x_tilde[None], both)):
        for index, grid in enumerate(grids):
            expected, _ = paper_recursion(weight[0], x, x_tilde, grid)
            assert torch.equal(codes[0, :, 9 * index : 9 * index + 9], expected)


def test_dead_input_keeps_its_rounded_weight():
    x, x_tilde = streams(60, 20, dtype=torch.float32)
    x[:, 7] = x_tilde[:, 7] = 0
    weight = weights(20, 6, dtype=torch.float32)
    grid = grid_for(weight, 15)
    nearest = grid.nearest(weight)
    for codes in (
        follow_gram(weight, *grams(x, x_tilde), grid),
        follow_samples(weight, x[None], x_tilde[None], grid),
        coordinate_descent(weight, *grams(x, x_tilde), grid, torch.zeros_like(nearest), sweeps=1),
    ):
        assert torch.equal(codes[0, 7], nearest[0, 7])


def squared_error(weight: Tensor, x: Tensor, x_tilde: Tensor, grid: Grid, codes: Tensor) -> Tensor:
    return (x @ weight[0] - x_tilde @ grid.values(codes)[0]).square().sum(0)


def test_coordinate_descent_never_makes_a_neuron_worse():
    x, x_tilde = streams(500, 150, dtype=torch.float64)
    weight = weights(150, 40, dtype=torch.float64)
    grid = grid_for(weight, 7)
    plain = follow_gram(weight, *grams(x, x_tilde), grid)
    previous = squared_error(weight, x, x_tilde, grid, plain)
    for sweeps in (1, 2, 5):
        codes = coordinate_descent(weight, *grams(x, x_tilde), grid, plain, sweeps=sweeps)
        error = squared_error(weight, x, x_tilde, grid, codes)
        assert bool((error <= previous * (1 + 1e-9)).all())
        previous = error
    assert float(previous.sum()) < 0.95 * float(squared_error(weight, x, x_tilde, grid, plain).sum())


@pytest.mark.parametrize("d", [40, 300])
def test_coordinate_descent_on_samples_is_that_of_the_gram_matrices(d: int):
    x, x_tilde = streams(200, d, dtype=torch.float64)
    weight = weights(d, 9, dtype=torch.float64)
    grid, ridge = grid_for(weight, 7, group_size=16), torch.tensor([3.0], dtype=torch.float64)
    cross, gram = grams(x, x_tilde)
    eye = ridge * torch.eye(d, dtype=torch.float64)
    plain = grid.nearest(weight)
    expected = coordinate_descent(weight, cross + eye, gram + eye, grid, plain, sweeps=2)
    codes = coordinate_descent_on_samples(weight, x[None], x_tilde[None], grid, plain, sweeps=2, ridge=ridge)
    assert torch.equal(codes, expected) and not torch.equal(codes, plain)


def test_coordinate_descent_ends_where_no_single_code_helps():
    x, x_tilde = streams(300, 40, dtype=torch.float64)
    weight = weights(40, 5, dtype=torch.float64)
    grid = grid_for(weight, 7)
    codes = follow_gram(weight, *grams(x, x_tilde), grid)
    codes = coordinate_descent(weight, *grams(x, x_tilde), grid, codes, sweeps=100)
    best = squared_error(weight, x, x_tilde, grid, codes)
    for t in range(40):
        for step in (-1, 1):
            other = codes.clone()
            other[0, t] = (codes[0, t].int() + step).clamp(0, 6).to(torch.uint8)
            assert bool((squared_error(weight, x, x_tilde, grid, other) >= best * (1 - 1e-9)).all())


def test_aligned_is_error_feedback_on_the_least_squares_weights():
    """Against the definition: V by least squares, then q_t = Q(v_t), the rest of V re-fitted after each input."""
    x, x_tilde = streams(400, 12, dtype=torch.float64)
    weight = weights(12, 7, dtype=torch.float64)
    grid = grid_for(weight, 7)
    cross, gram = grams(x, x_tilde)
    ridge = 0.01 * gram[0].diagonal().mean() * torch.eye(12, dtype=torch.float64)
    h, g = gram[0] + ridge, cross[0] + ridge
    v = torch.linalg.solve(h, g @ weight[0])
    codes = torch.zeros(12, 7, dtype=torch.uint8)
    for t in range(12):
        codes[t] = (v[t] / grid.scale[0, 0] + grid.zero[0, 0] + 0.5).floor().clamp(0, 6).to(torch.uint8)
        error = grid.scale[0, 0] * (codes[t] - grid.zero[0, 0]) - v[t]
        # The remaining inputs minimize the quadratic given this one.
        v[t + 1 :] -= torch.linalg.solve(h[t + 1 :, t + 1 :], h[t + 1 :, t, None]) * error
    assert torch.equal(follow_aligned(weight, cross, gram, grid)[0], codes)


def test_cost_rule():
    assert gram_is_cheaper(inputs=768, columns=3072, samples=1024)
    assert not gram_is_cheaper(inputs=3072, columns=768, samples=1024)


def test_stochastic_rounding_is_unbiased_and_repeatable():
    weight = torch.full((1, 1, 20_000), 0.3)
    grid = Grid(scale=torch.ones(1, 1, 20_000), zero=torch.ones(1, 1, 20_000), levels=3, group_size=1)
    one = torch.ones(1, 1, 1)
    first = follow_gram(weight, one, one, grid, rounding=Rounding(stochastic=True, seed=5))
    again = follow_gram(weight, one, one, grid, rounding=Rounding(stochastic=True, seed=5))
    other = follow_gram(weight, one, one, grid, rounding=Rounding(stochastic=True, seed=6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(grid.values(first).mean()) == pytest.approx(0.3, abs=0.02)  # six standard errors


def test_shrinking_makes_zeros():
    weight = torch.tensor([[[-1.4, -0.9, -0.6, 0.2, 0.6, 0.9, 1.4]]])
    grid = Grid(scale=torch.ones(1, 1, 7), zero=torch.ones(1, 1, 7), levels=3, group_size=1)
    one = torch.ones(1, 1, 1)

    def values(shrink: str | None, threshold: float) -> list[float]:
        codes = follow_gram(weight, one, one, grid, rounding=Rounding(shrink=shrink, threshold=threshold))
        return grid.values(codes).flatten().tolist()

    assert values(None, 0) == [-1, -1, -1, 0, 1, 1, 1]
    assert values("l1", 0.25) == [-1, -1, 0, 0, 0, 1, 1]
    assert values("l0", 0.95) == [-1, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("kernel", VARIANTS)
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 128), st.integers(0, 100)),
    levels=st.sampled_from([2, 3, 4, 7, 16, 256]),
    modes=st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 2)),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_variant_equals_the_reference(
    kernel: str, shape: tuple[int, int, int], levels: int, modes: tuple[int, int, int], seed: int
):
    problems, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    groups = max(1, min(3, rows))
    panel = torch.randn(shape, generator=generator)
    if seed % 2 and panel.numel() > 5:
        panel.view(-1)[5] = float("nan")  # must give the same code everywhere, whatever it is
    lower = torch.randn(problems, rows, rows, generator=generator) / max(rows, 1) ** 0.5
    scale = torch.rand(problems, groups, columns, generator=generator) + 0.1
    inverse, zero = 1 / scale, torch.randint(0, levels, scale.shape, generator=generator) / 2
    group = torch.randint(0, groups, (rows,), generator=generator, dtype=torch.int32)
    previous = torch.randn(shape, generator=generator)

    def run(variant: str) -> tuple[Tensor, Tensor]:
        amounts, codes = panel.clone(), torch.full(shape, 255, dtype=torch.uint8)
        status = _C.gpfq_panel_f32(
            (problems, rows, columns, groups),
            amounts.data_ptr(),
            lower.data_ptr(),
            (scale.data_ptr(), inverse.data_ptr(), zero.data_ptr()),
            group.data_ptr(),
            previous.data_ptr(),
            codes.data_ptr(),
            levels,
            modes,
            0.6,
            seed,
            7,
            variant,
        )
        assert status == 0
        return amounts, codes

    assert _C.gpfq_select(kernel) == kernel
    amounts, codes = run(kernel)
    expected_amounts, expected_codes = run("reference")
    assert torch.equal(codes, expected_codes)
    assert bool((codes < levels).all()) or levels == 256
    # NaN equals itself here: it goes where the reference lets it go.
    assert torch.equal(amounts.nan_to_num(12345.0), expected_amounts.nan_to_num(12345.0))


def test_the_environment_forces_a_variant(monkeypatch: pytest.MonkeyPatch):
    for kernel in VARIANTS:
        monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", kernel)
        assert _C.gpfq_select() == kernel


@pytest.mark.parametrize("change", [{"levels": 1}, {"levels": 257}, {"group": 2}, {"rows": 129}, {"feedback": 1}])
def test_bad_arguments_are_refused(change: dict[str, int]):
    rows = change.get("rows", 2)
    data = torch.zeros(rows * rows + rows)
    group = torch.full((rows,), change.get("group", 0), dtype=torch.int32)
    address = data.data_ptr()
    status = _C.gpfq_panel_f32(
        (1, rows, 1, 1),
        address,
        address,
        (address, address, address),
        group.data_ptr(),
        0,
        address,
        change.get("levels", 3),
        (change.get("feedback", 0), 0, 0),
        0.0,
        0,
        0,
        "",
    )
    assert _C.status_message(status) == "a size, stride or pointer is out of range"
