import json

import numpy as np
import pytest
import torch
from bantamweight.curvature import spectral_density
from bantamweight.curvature.density import density_of
from bantamweight.curvature.lanczos import DenseMatrix
from small_networks import dense_hessian, network
from torch.nn import functional


def test_moments_equal_the_dense_hessians(case):
    model, loss_fn, data = case
    values = torch.linalg.eigvalsh(dense_hessian(model, loss_fn, data)).numpy()
    result = spectral_density(model, loss_fn, data, probes=200, steps=12)
    assert result.weights.sum() == pytest.approx(1.0) and (result.weights >= 0).all()
    for power in (1, 2):
        truth = np.mean(values**power)
        noise = 4 * np.sqrt(2 * np.mean(values ** (2 * power)) / (200 * len(values)))  # of 200 probes
        assert abs(result.weights @ result.nodes**power - truth) < noise
    assert result.nodes.max() == pytest.approx(values[-1], rel=1e-2)
    assert result.nodes.min() >= values[0] - 1e-9


def test_all_steps_make_every_node_an_eigenvalue():
    matrix = DenseMatrix(torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)))
    result = density_of(matrix, probes=1, steps=4)
    np.testing.assert_allclose(result.nodes, [1, 2, 4, 8], atol=1e-10)
    np.testing.assert_allclose(result.weights, 0.25, atol=1e-10)
    assert np.trapezoid(result.density, result.grid) == pytest.approx(1.0, abs=1e-4)
    assert result.fraction(1.5, 4.5) == pytest.approx(0.5)


def test_zero_matrix_and_bad_input():
    zero = DenseMatrix(torch.zeros(5, 5, dtype=torch.float64))
    result = density_of(zero)
    assert result.products == 4 and np.isfinite(result.density).all()
    with pytest.raises(ValueError, match="steps"):
        density_of(zero, steps=0)
    with pytest.raises(ValueError, match="width is -1"):
        density_of(zero, width=-1)


def test_text_json_and_picture(tmp_path):
    model, data = network("mlp")
    result = spectral_density(model, functional.cross_entropy, data, probes=2, steps=8)
    assert result.products == 16 and "evaluation mode" in str(result)
    assert json.loads(result.to_json())["nodes"] == result.nodes.tolist()
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "density.png")
    assert (tmp_path / "density.png").stat().st_size > 1000
