import mmap

import numpy as np
import pytest
import torch
from bantamweight import _C
from bantamweight.curvature import vectors
from bantamweight.curvature.lanczos import lanczos
from bantamweight.curvature.vectors import Basis

SHAPES = [(3, 5), (1,), (0,), (64, 33), (7, 1, 2)]
VARIANTS = [name for name, missing in _C.vector_variants() if not missing]


def tensors(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def flat(parts):
    return torch.cat([part.reshape(-1) for part in parts])


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", request.param)
    assert _C.vector_select() == request.param
    return request.param


def test_list_operations_equal_torch(variant):
    x, y = tensors(), tensors(seed=1)
    expected = flat(y) + 0.5 * flat(x)
    assert vectors.dot(x, y) == pytest.approx(float(flat(x).double() @ flat(y).double()), rel=1e-5)
    assert vectors.norm(x) == pytest.approx(float(flat(x).double().norm()), rel=1e-6)
    vectors.axpy(0.5, x, y)
    torch.testing.assert_close(flat(y), expected)
    vectors.scale(-2.0, y)
    torch.testing.assert_close(flat(y), -2 * expected)


def test_list_operations_take_any_layout_and_type():
    x = [torch.randn(4, 6).T, torch.randn(3)]
    y = [torch.randn(6, 4), torch.randn(3)]
    assert vectors.dot(x, y) == pytest.approx(float(flat(x) @ flat(y)), rel=1e-5)
    x64, y64 = tensors(torch.float64), tensors(torch.float64, 1)
    expected = flat(y64) - 3 * flat(x64)
    vectors.axpy(-3.0, x64, y64)
    torch.testing.assert_close(flat(y64), expected)
    with pytest.raises(ValueError, match="differ in their sizes"):
        vectors.dot(tensors(), tensors()[:-1])


def test_basis_is_orthogonal_to_working_precision(variant):
    size = sum(int(np.prod(shape)) for shape in SHAPES)
    basis = Basis(size, torch.float32, torch.device("cpu"))
    nearly = torch.randn(size, generator=torch.Generator().manual_seed(5))
    for i in range(40):  # nearly parallel: one pass of Gram-Schmidt would lose everything
        vector = nearly + 1e-3 * flat(tensors(seed=i))
        _, before, after, _ = basis.orthogonalise([vector])
        assert before == pytest.approx(float(vector.norm()), rel=1e-5)
        basis.append(after)
    V = basis.combine(np.eye(40))
    torch.testing.assert_close(V @ V.T, torch.eye(40), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [3, 300_001], ids=["small", "huge pages"])
def test_new_rows_do_not_overlap(dtype, size):
    rows = vectors.new_rows(4, size, dtype, torch.device("cpu"))
    assert rows.shape == (4, size) and rows.dtype == dtype
    for i in range(4):
        assert rows[i].is_contiguous()
        rows[i] = i + 1
    assert rows.sum(1).tolist() == [size, 2 * size, 3 * size, 4 * size]
    if size > 3 and hasattr(mmap, "MADV_HUGEPAGE"):
        assert all(row.data_ptr() % 64 == 0 for row in rows)  # what stores past the caches need


def test_a_long_basis_is_orthogonal_in_huge_pages():
    basis = Basis(300_001, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        basis.append(basis.orthogonalise([torch.randn(300_001, generator=generator)]).after)
    V = basis.combine(np.eye(3))
    torch.testing.assert_close(V @ V.T, torch.eye(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonalise_returns_the_coefficients(dtype):
    size = sum(int(np.prod(shape)) for shape in SHAPES)
    basis = Basis(size, dtype, torch.device("cpu"))
    for seed in range(20):
        basis.append(basis.orthogonalise(tensors(dtype, seed)).after)
    V = basis.combine(np.eye(20))
    parts = tensors(dtype, 99)
    probe, elsewhere = flat(tensors(dtype, 98)), torch.empty(size, dtype=dtype)
    coefficients, before, after, inner = basis.orthogonalise(parts, scale=0.5, along=probe, into=elsewhere)
    w = 0.5 * flat(parts)
    rest = w - V.T @ (V @ w)
    np.testing.assert_allclose(coefficients, V @ w, atol=1e-4 if dtype == torch.float32 else 1e-12)
    assert before == pytest.approx(float(w.norm()), rel=1e-5)
    assert after == pytest.approx(float(rest.norm()), rel=1e-5)
    assert inner == pytest.approx(float(probe @ rest), abs=1e-3)
    torch.testing.assert_close(elsewhere, rest, atol=1e-5, rtol=1e-4)
    assert basis.orthogonalise(parts, scale=0.5).after == after
    assert torch.equal(basis.free_row(), elsewhere)


def test_a_lanczos_step_makes_one_pass_over_the_basis(monkeypatch):
    """It measures one vector, then removes at most two and measures all in one pass; seldom is there another."""
    measured, removed = [], []
    measure, remove = _C.vector_measure, _C.vector_remove
    monkeypatch.setattr(_C, "vector_measure", lambda *a: measured.append(len(a[2])) or measure(*a))
    monkeypatch.setattr(_C, "vector_remove", lambda *a: removed.append(len(a[3])) or remove(*a))
    diagonal = torch.linspace(-1, 1, 50_000)

    class Diagonal:
        size, dtype, device = 50_000, torch.float32, torch.device("cpu")

        def product(self, vector):
            return [diagonal * vector]

    result = lanczos(Diagonal(), k=2, tol=1e-6, max_products=30)
    assert result.products == 30
    assert max(measured) <= 1 and len(measured) <= 30
    assert max(removed) <= 2 and len(removed) <= 32  # the start, and a second pass where rounding asked for it


def test_lanczos_in_float32_equals_float64(variant):
    generator = torch.Generator().manual_seed(1)
    Q, _ = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))
    values = torch.cat([torch.tensor([50.0, 40.0, 30.0, -45.0]), torch.linspace(-1, 1, 296)]).double()
    H = Q @ torch.diag(values) @ Q.T

    class Lists:
        """The dense matrix, its products handed out in two tensors as a model's would be."""

        size, dtype, device = 300, torch.float32, torch.device("cpu")

        def product(self, vector):
            Hv = (H.float() @ vector).clone()
            return [Hv[:100].view(10, 10), Hv[100:]]

    result = lanczos(Lists(), k=4, tol=1e-8)
    assert result.converged
    np.testing.assert_allclose(result.values, [50, -45, 40, 30], rtol=1e-5)
    torch.testing.assert_close(result.vectors @ result.vectors.T, torch.eye(4), atol=1e-5, rtol=0)
