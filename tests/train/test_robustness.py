"""Loss surface, accuracy after quantization, and the cost of a step."""

import copy
import math

import pytest
import torch
from bantamweight.errors import BantamweightError
from bantamweight.train import loop
from bantamweight.train.robustness import relative_cost, robustness
from bantamweight.train.surface import filter_normalised_direction, filter_normalised_surface
from torch import nn
from torch.nn import functional as F  # noqa: N812


def trained():
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(150) % 3
    x = torch.randn(150, 6, generator=generator) + 4 * F.one_hot(y, 6)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    loop.train(model, x, y, loop.TrainConfig(optimizer="sgd", epochs=5, batch_size=32))
    return model, x, y


def test_directions_have_the_norms_of_the_filters():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 5))
    direction = filter_normalised_direction(model, torch.Generator().manual_seed(0))
    assert direction.keys() == {"0.weight", "2.weight"}
    for name, d in direction.items():
        norms = dict(model.named_parameters())[name].detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(d.flatten(1).norm(dim=1), norms)


def test_the_surface_is_the_loss_at_displaced_weights():
    model, x, y = trained()
    before = copy.deepcopy(model.state_dict())
    surface = filter_normalised_surface(model, x, y, radius=0.5, points=5, seed=3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert surface.losses[2, 2] == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-6)
    assert surface.offsets.tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5]
    generator = torch.Generator().manual_seed(3)
    first, second = (filter_normalised_direction(model, generator) for _ in range(2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in first:
                p += 0.5 * first[name] - 0.25 * second[name]
    assert surface.losses[4, 1] == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-5)
    with pytest.raises(BantamweightError, match="points is 4"):
        filter_normalised_surface(model, x, y, points=4)


def test_robustness_is_measured_on_the_quantized_copies():
    model, x, y = trained()
    before = copy.deepcopy(model.state_dict())
    result = robustness(model, x, y, x, y, bits=(8, 2), hessian_samples=150)
    assert result.float_accuracy == loop.accuracy(model, x, y)
    assert result.gpfq.keys() == result.nearest.keys() == {8, 2}
    assert abs(result.nearest[8] - result.float_accuracy) < 0.02
    loss = F.cross_entropy(model(x), y)
    parameters = list(model.parameters())
    flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, allow_unused=True) for g in flat]
    dense = torch.stack([torch.cat([torch.zeros_like(p).flatten() if r is None else r.flatten() for r, p in zip(row, parameters, strict=True)]) for row in rows])  # fmt: skip  # noqa: E501
    top = max(torch.linalg.eigvalsh((dense + dense.T) / 2).tolist(), key=abs)
    assert result.lambda_max == pytest.approx(top, rel=0.05)
    assert result.trace == pytest.approx(float(dense.trace()), rel=0.3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_relative_cost_leaves_the_model_and_the_generator_alone():
    model, x, y = trained()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    cost = relative_cost(model, x[:32], y[:32], loop.TrainConfig(optimizer="hero"), rounds=3)
    assert math.isfinite(cost) and cost > 0
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
