import json

import numpy as np
import pytest
import torch
from bantamweight.curvature import Hessian, top_eigenvalues
from bantamweight.curvature.eigenvalues import eigenvalues_of
from bantamweight.curvature.lanczos import DenseMatrix, lanczos
from bantamweight.curvature.power import power_iteration
from small_networks import dense_hessian, network
from torch import nn
from torch.nn import functional


def symmetric(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return Q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ Q.T


def wanted(values, k, which):
    values = np.sort(values)
    if which == "largest_magnitude":
        return values[np.argsort(-np.abs(values))][:k]
    if which == "largest":
        return values[::-1][:k]
    return values[:k] if which == "smallest" else np.concatenate([values[::-1][:k], values[:k][::-1]])


@pytest.mark.parametrize("which", ["largest_magnitude", "largest", "smallest", "both_ends"])
def test_eigenvalues_equal_the_dense_hessians(case, which):
    model, loss_fn, data = case
    H = dense_hessian(model, loss_fn, data)
    result = top_eigenvalues(model, loss_fn, data, k=5, which=which, tol=1e-13, max_products=len(H))
    expected = wanted(torch.linalg.eigvalsh(H).numpy(), 5, which)
    np.testing.assert_allclose(np.sort(result.values), np.sort(expected), atol=1e-6, rtol=0)
    assert result.converged
    V = result.vectors
    torch.testing.assert_close(V @ V.T, torch.eye(len(V), dtype=V.dtype), atol=1e-10, rtol=0)
    residuals = torch.linalg.vector_norm(V @ H - torch.from_numpy(result.values)[:, None] * V, dim=1)
    np.testing.assert_allclose(residuals, result.residuals, atol=1e-9)


def test_every_block_of_a_shared_graph(case):
    model, loss_fn, data = case
    hessian = Hessian(model, loss_fn, data)
    for name in [name for name in hessian.names if name.endswith("weight")]:
        block = hessian.block(name)
        result = eigenvalues_of(block, tol=1e-12, max_products=block.size)
        values = torch.linalg.eigvalsh(dense_hessian(model, loss_fn, data, [name])).numpy()
        np.testing.assert_allclose(np.abs(result.values[0]), np.abs(values).max(), atol=1e-6)


def test_tolerance_bounds_the_error_and_spares_products():
    values = [100.0, 90.0, 80.0, 40.0, 39.0, -60.0, *np.linspace(-1, 1, 300)]
    matrix = DenseMatrix(symmetric(values))
    loose = lanczos(matrix, k=6, tol=1e-3)
    tight = lanczos(matrix, k=6, tol=1e-12)
    assert loose.converged and tight.converged and loose.products < tight.products < 40
    np.testing.assert_allclose(loose.values, [100, 90, 80, -60, 40, 39], rtol=1e-3)
    np.testing.assert_allclose(tight.values, [100, 90, 80, -60, 40, 39], rtol=1e-11)


def test_block_lanczos_finds_multiple_eigenvalues():
    matrix = DenseMatrix(symmetric([5.0, 5.0, 5.0, 4.0, *np.linspace(0, 1, 60)]))
    single = lanczos(matrix, k=3, tol=1e-10, max_products=10)
    block = lanczos(matrix, k=3, tol=1e-10, block_size=3)
    np.testing.assert_allclose(block.values, [5, 5, 5], atol=1e-8)
    assert block.converged and single.values[1] < 4.5  # why the block is there


def test_exhausted_krylov_space_goes_on_from_a_new_direction():
    matrix = DenseMatrix(symmetric([2.0] * 5 + [1.0] * 5))
    result = lanczos(matrix, k=4, tol=1e-10)
    np.testing.assert_allclose(result.values, [2, 2, 2, 2], atol=1e-8)
    everything = lanczos(DenseMatrix(symmetric([3.0, 2.0, 1.0])), k=3, tol=1e-10)
    np.testing.assert_allclose(everything.values, [3, 2, 1], atol=1e-10)
    low_rank = lanczos(DenseMatrix(symmetric([3.0, 2.0] + [0.0] * 60)), k=2)
    assert low_rank.converged and low_rank.products < 8
    zero = lanczos(DenseMatrix(torch.zeros(6, 6, dtype=torch.float64)), k=2)
    assert zero.converged and not zero.values.any()


@pytest.mark.parametrize("block_size", [1, 3])
def test_thick_restart_bounds_the_basis(block_size):
    values = [10.0, 9.0, 8.0, *np.linspace(0, 7.5, 400)]
    matrix = DenseMatrix(symmetric(values))
    result = lanczos(matrix, k=3, tol=1e-8, max_products=1000, max_basis=20, block_size=block_size)
    assert result.converged and result.products > 20
    np.testing.assert_allclose(result.values, [10, 9, 8], atol=1e-6)
    residuals = torch.linalg.vector_norm(
        result.vectors @ matrix.matrix - torch.from_numpy(result.values)[:, None] * result.vectors, dim=1
    )
    np.testing.assert_allclose(residuals, result.residuals, atol=1e-9)


def test_warm_start_saves_products():
    model, (inputs, targets) = network("conv")
    first = top_eigenvalues(model, functional.cross_entropy, (inputs[:5], targets[:5]), tol=1e-4)
    cold = top_eigenvalues(model, functional.cross_entropy, (inputs, targets), tol=1e-4)
    warm = top_eigenvalues(model, functional.cross_entropy, (inputs, targets), tol=1e-4, start=first)
    assert warm.products < cold.products
    np.testing.assert_allclose(warm.values, cold.values, rtol=1e-3)


def test_a_run_that_does_not_converge_says_so():
    model, data = network("mlp")
    result = top_eigenvalues(model, functional.cross_entropy, data, k=4, tol=1e-10, max_products=6)
    assert not result.converged and result.products == 6 and len(result.values) == 4
    assert "NOT converged" in str(result) and json.loads(result.to_json())["converged"] is False


def test_power_iteration_and_its_deflation():
    matrix = DenseMatrix(symmetric([-9.0, 6.0, 4.0] + [0.5] * 40))
    result = power_iteration(matrix, k=3, tol=1e-10, max_steps=500)
    np.testing.assert_allclose(result.values, [-9, 6, 4], atol=1e-6)
    assert result.converged and result.residuals.max() < 1e-3
    stopped = power_iteration(matrix, k=1, tol=1e-10, max_steps=2)
    assert not stopped.converged and stopped.products == 2
    zero = power_iteration(DenseMatrix(torch.zeros(4, 4, dtype=torch.float64)), k=2)
    assert not zero.values.any() and bool(torch.isfinite(zero.vectors).all())


def test_power_iteration_on_a_model_agrees_with_lanczos():
    model, data = network("attention")
    power = top_eigenvalues(model, functional.cross_entropy, data, method="power", tol=1e-9, max_products=1000)
    exact = top_eigenvalues(model, functional.cross_entropy, data, tol=1e-10)
    np.testing.assert_allclose(power.values, exact.values, rtol=1e-5)
    with pytest.raises(ValueError, match="power iteration finds the largest magnitude"):
        top_eigenvalues(model, functional.cross_entropy, data, method="power", which="smallest")


def test_result_as_json_and_text(tmp_path):
    model, data = network("mlp")
    result = top_eigenvalues(model, functional.cross_entropy, data, k=2)
    text = result.to_json(tmp_path / "eigenvalues.json")
    loaded = json.loads((tmp_path / "eigenvalues.json").read_text())
    assert loaded == json.loads(text) and loaded["values"] == result.values.tolist()
    assert loaded["conditions"]["mode"] == "eval" and "vectors" not in loaded
    assert [p.name for p in tmp_path.iterdir()] == ["eigenvalues.json"]
    assert "evaluation mode" in str(result)
    named = result.named_vector(0)
    assert {name: tuple(v.shape) for name, v in named.items()} == {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, "k asks for 0"),
        ({"k": 99}, "k asks for 99"),
        ({"which": "middle"}, "'middle'"),
        ({"tol": 0.0}, "tol is 0.0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"max_products": 0}, "max_products is 0"),
        ({"start": torch.ones(1, 3)}, "vectors of 3"),
        ({"start": torch.zeros(1, 4)}, "not zero"),
    ],
)
def test_bad_input_gets_a_sentence(change, words):
    with pytest.raises(ValueError, match=words):
        lanczos(DenseMatrix(torch.eye(4, dtype=torch.float64)), **change)


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    model, data = network("mlp")
    result = top_eigenvalues(model, functional.cross_entropy, data, k=2, which="both_ends")
    figure = result.plot(tmp_path / "eigenvalues.png")
    assert (tmp_path / "eigenvalues.png").read_bytes().startswith(b"\x89PNG")
    points = figure.axes[0].lines[1].get_ydata()
    np.testing.assert_array_equal(points, result.values)


def test_starting_with_the_gradient_misses_no_direction():
    """Half of the network is dead to the gradient: its curvature must be found all the same."""
    model = nn.Linear(3, 2, bias=False).double()
    data = (torch.eye(3).double()[:2], torch.zeros(2, 2).double())
    with torch.no_grad():
        model.weight.zero_()
        model.weight[0, 0] = 1e-3  # the gradient has this direction and no other
    result = top_eigenvalues(model, lambda z, y: (z**2 * torch.tensor([1.0, 5.0])).mean(), data, tol=1e-10)
    assert result.values[0] == pytest.approx(2.5)
