import json

import numpy as np
import pytest
import torch
from bantamweight.curvature import Hessian, trace
from bantamweight.curvature.lanczos import DenseMatrix
from bantamweight.curvature.trace import block_traces, student_t, trace_of
from small_networks import dense_hessian, network
from torch.nn import functional


def decaying(size=200):
    """A spectrum like a network's: few large eigenvalues, many small ones of both signs."""
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = 50.0 / torch.arange(1, size + 1, dtype=torch.float64) ** 2
    values[20:] *= torch.where(torch.arange(size - 20) % 3 == 0, -1.0, 1.0)
    return DenseMatrix(Q @ torch.diag(values) @ Q.T), float(values.sum())


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_the_interval_covers_the_truth_in_nine_of_ten_repeats(method):
    matrix, truth = decaying()
    estimates = [trace_of(matrix, method=method, products=60, seed=seed) for seed in range(30)]
    covered = sum(low <= truth <= high for low, high in (e.interval() for e in estimates))
    assert covered >= 27
    mean = np.mean([e.value for e in estimates])
    spread = np.std([e.value for e in estimates], ddof=1)
    assert abs(mean - truth) < 4 * spread / np.sqrt(30)  # unbiased
    claimed = np.sqrt(np.mean([e.standard_error**2 for e in estimates]))
    assert 0.6 * spread < claimed < 1.7 * spread  # and neither timid nor bold


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_a_models_trace_is_covered(method):
    model, data = network("attention")
    truth = float(dense_hessian(model, functional.cross_entropy, data).trace())
    results = [
        trace(model, functional.cross_entropy, data, method=method, products=45, seed=seed) for seed in range(10)
    ]
    assert sum(low <= truth <= high for low, high in (r.interval(0.99) for r in results)) >= 9


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_a_convolution_networks_trace_is_covered_in_nine_of_ten_repeats(method):
    model, data = network("conv")
    with torch.no_grad():
        model.head.weight.mul_(5)  # confident, as a trained network is: a few eigenvalues stand out
    H = dense_hessian(model, functional.cross_entropy, data)
    hessian = Hessian(model, functional.cross_entropy, data)
    estimates = [trace_of(hessian, method=method, products=30, seed=seed) for seed in range(30)]
    covered = sum(low <= float(H.trace()) <= high for low, high in (e.interval(0.95) for e in estimates))
    assert covered >= 27
    widths = [e.standard_error for e in estimates]
    assert 0 < max(widths) < float(torch.linalg.matrix_norm(H))  # an error bar, not an excuse


def test_hutch_plus_plus_needs_fewer_products():
    matrix, _ = decaying()
    plain = np.mean([trace_of(matrix, method="hutchinson", products=60, seed=s).standard_error for s in range(5)])
    better = np.mean([trace_of(matrix, method="hutch++", products=60, seed=s).standard_error for s in range(5)])
    assert better < plain / 5


def test_tolerance_stops_early():
    matrix, _ = decaying()
    result = trace_of(matrix, method="hutchinson", products=5000, tol=0.05)
    assert result.products < 5000 and result.standard_error <= 0.05 * abs(result.value)


def test_block_traces_share_their_products():
    model, data = network("conv")
    hessian = Hessian(model, functional.cross_entropy, data)
    blocks = {name: [name] for name in hessian.names}
    found = block_traces(hessian, blocks, products=400)
    assert hessian.products == 400
    H = dense_hessian(model, functional.cross_entropy, data).diagonal()
    for name, values in zip(hessian.names, H.split([p.numel() for p in model.parameters()]), strict=True):
        low, high = found[name].interval(0.9999)
        assert low <= float(values.sum()) <= high


def test_a_diagonal_matrix_is_exact_and_quantiles_are_students():
    matrix = DenseMatrix(torch.diag(torch.arange(40.0)))
    result = trace_of(matrix, method="hutchinson", products=8)
    assert result.value == pytest.approx(780) and result.standard_error == pytest.approx(0, abs=1e-4)
    scipy_stats = pytest.importorskip("scipy.stats")
    for degrees in (5, 7, 19, 100):
        assert student_t(0.975, degrees) == pytest.approx(scipy_stats.t.ppf(0.975, degrees), rel=3e-3)


def test_result_and_bad_input(tmp_path):
    model, data = network("mlp")
    result = trace(model, functional.cross_entropy, data, products=30)
    assert json.loads(result.to_json())["samples"] == result.samples.tolist()
    assert "+-" in str(result) and "evaluation mode" in str(result)
    with pytest.raises(ValueError, match="needs at least 24"):
        trace(model, functional.cross_entropy, data, products=10)
    with pytest.raises(ValueError, match="'hutchinson' or"):
        trace(model, functional.cross_entropy, data, method="exact")
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "trace.svg")
    assert b"<svg" in (tmp_path / "trace.svg").read_bytes()
