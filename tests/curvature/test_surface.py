import json

import numpy as np
import pytest
import torch
from bantamweight.curvature import loss_surface, top_eigenvalues
from small_networks import network
from torch.nn import functional


def test_surface_has_the_eigenvalues_as_its_curvature():
    model, (inputs, targets) = network("mlp")
    top = top_eigenvalues(model, functional.cross_entropy, (inputs, targets), k=2, which="largest", tol=1e-12)
    before = [p.detach().clone() for p in model.parameters()]
    batches = [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]
    surface = loss_surface(model, functional.cross_entropy, batches, top, radius=1e-3, points=3)
    along = np.diff(surface.loss, n=2, axis=0)[0, 1] / 1e-6
    across = np.diff(surface.loss, n=2, axis=1)[1, 0] / 1e-6
    assert along == pytest.approx(top.values[0], rel=1e-4)
    assert across == pytest.approx(top.values[1], rel=1e-4)
    assert surface.loss[1, 1] == pytest.approx(top.conditions.loss, abs=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_default_radius_picture_and_bad_input(tmp_path):
    model, data = network("mlp")
    top = top_eigenvalues(model, functional.cross_entropy, data, k=2)
    surface = loss_surface(model, functional.cross_entropy, data, top, points=5)
    assert surface.steps[-1] > 0 and len(json.loads(surface.to_json())["loss"]) == 5
    with pytest.raises(ValueError, match="needs two eigenvectors"):
        loss_surface(model, functional.cross_entropy, data, top_eigenvalues(model, functional.cross_entropy, data))
    pytest.importorskip("matplotlib")
    surface.plot(tmp_path / "surface.png")
    assert (tmp_path / "surface.png").stat().st_size > 5000
