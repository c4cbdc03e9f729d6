import json

import pytest
import torch
from bantamweight.curvature import gauss_newton_eigenvalues
from bantamweight.errors import CalibrationError, UnsupportedLayerError
from small_networks import ConvNet, dense_hessian, network
from torch import nn
from torch.nn import functional


def dense_gauss_newton(model, loss_fn, data, names):
    """J^T H_L J over some weights, by torch.func: independent of the code under test."""
    inputs, targets = data
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    model.eval()
    sizes = [parameters[name].numel() for name in names]

    def outputs(flat):
        parts = zip(names, flat.split(sizes), strict=True)
        chosen = {name: part.view(parameters[name].shape) for name, part in parts}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(model, {**parameters, **chosen}, (inputs,)).reshape(-1)

    flat = torch.cat([parameters[name].reshape(-1) for name in names])
    J = torch.autograd.functional.jacobian(outputs, flat)
    z = outputs(flat)
    shape = (len(targets), -1)
    HL = torch.autograd.functional.hessian(lambda z: loss_fn(z.view(shape), targets), z)
    return J.T @ HL @ J


def check(model, data, loss_fn, result, blocks):
    for block, layers in blocks.items():
        names = [f"{layer}.weight" if layer else "weight" for layer in layers]
        G = dense_gauss_newton(model, loss_fn, data, names)
        value = float(torch.linalg.eigvalsh(G)[-1])
        assert result.values[block] == pytest.approx(value, rel=1e-9)
        found = torch.cat([result.vectors[block][layer].reshape(-1) for layer in layers])
        assert float(found.norm()) == pytest.approx(1.0)
        assert float((G @ found - value * found).norm()) < 1e-5 * value


def test_every_layer_equals_the_dense_matrix(case):
    model, loss_fn, data = case
    result = gauss_newton_eigenvalues(model, loss_fn, data, rank_tol=0.0, vectors=True)
    check(model, data, loss_fn, result, {name: [name] for name in result.values})
    assert result.passes == 2  # three classes, two directions of the softmax


@pytest.mark.parametrize("memory", [1, None], ids=["layer by layer", "at once"])
def test_batches_and_groups_of_layers(memory):
    model, (inputs, targets) = network("conv")
    batches = [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]
    whole = gauss_newton_eigenvalues(model, functional.cross_entropy, (inputs, targets), rank_tol=0.0)
    parts = gauss_newton_eigenvalues(model, functional.cross_entropy, batches, rank_tol=0.0, memory=memory)
    assert parts.values == pytest.approx(whole.values, rel=1e-9)
    assert parts.passes == (4 * 3 if memory else 4)


def test_blocks_of_several_layers():
    model, data = network("attention")
    blocks = {"attention": ["q", "k", "v", "out"], "head": ["head"]}
    result = gauss_newton_eigenvalues(model, functional.cross_entropy, data, blocks=blocks, rank_tol=0.0, vectors=True)
    check(model, data, functional.cross_entropy, result, blocks)


class Awkward(nn.Module):
    """Groups, dilation, stride, circular and 'same' padding, a 1d convolution, a layer used twice, inplace."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=(1, 2), dilation=(1, 2), stride=(2, 1), padding_mode="circular")
        self.grouped = nn.Conv2d(4, 6, (2, 3), groups=2, padding="same")
        self.line = nn.Conv1d(6, 4, 3, stride=2, padding=1, bias=False)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = functional.silu(self.first(x), inplace=True)
        x = self.line(functional.gelu(self.grouped(x)).mean(3))
        x = self.twice(torch.tanh(self.twice(x.mT)))
        return self.head(x.mean(1))


@pytest.mark.parametrize("loss_fn", [functional.cross_entropy, lambda z, y: functional.mse_loss(z, z.new_ones(8, 3))])
def test_awkward_layers_and_another_loss(loss_fn):
    torch.manual_seed(0)
    model = Awkward().double()
    data = (torch.randn(8, 2, 6, 6).double(), torch.randint(0, 3, (8,)))
    result = gauss_newton_eigenvalues(model, loss_fn, data, rank_tol=0.0, vectors=True)
    check(model, data, loss_fn, result, {name: [name] for name in result.values})
    assert set(result.values) == {"first", "grouped", "line", "twice", "head"}


def test_rank_tolerance_spares_rows_and_keeps_the_ranking():
    model, (inputs, targets) = network("conv")
    with torch.no_grad():
        model.head.weight.mul_(30)  # confident, as a trained network is
    exact = gauss_newton_eigenvalues(model, functional.cross_entropy, (inputs, targets), rank_tol=0.0)
    loose = gauss_newton_eigenvalues(model, functional.cross_entropy, (inputs, targets), rank_tol=1e-2)
    assert loose.rows < exact.rows and loose.ranking == exact.ranking
    assert loose.values == pytest.approx(exact.values, rel=2e-2)


def test_text_json_and_bad_input():
    model, data = network("mlp")
    result = gauss_newton_eigenvalues(model, functional.cross_entropy, data)
    assert json.loads(result.to_json())["values"] == result.values
    assert "gauss newton" in str(result) and result.ranking[0] in str(result)
    with pytest.raises(ValueError, match="'nothing' is no linear"):
        gauss_newton_eigenvalues(model, functional.cross_entropy, data, blocks={"a": ["nothing"]})
    with pytest.raises(ValueError, match=r"rank_tol is 1\.5"):
        gauss_newton_eigenvalues(model, functional.cross_entropy, data, rank_tol=1.5)
    with pytest.raises(UnsupportedLayerError, match=r"outputs \[n, classes\]"):
        gauss_newton_eigenvalues(nn.Sequential(model, nn.Flatten(0)), functional.cross_entropy, data)
    with pytest.raises(CalibrationError, match="scalar"):
        gauss_newton_eigenvalues(model, lambda z, y: z.sum(1), data)
    with pytest.raises(ValueError, match="requires grad"):
        gauss_newton_eigenvalues(ConvNet().requires_grad_(False), functional.cross_entropy, data)


def test_samples_without_curvature_are_left_out():
    model, (inputs, targets) = network("mlp")
    with torch.no_grad():
        model[4].weight.mul_(200)  # most samples are certain now
    data = (inputs, targets)
    full = gauss_newton_eigenvalues(model, functional.cross_entropy, data, rank_tol=0.0)
    seen = []
    handle = model[0].register_forward_hook(lambda *a: seen.append(len(a[1][0])))
    quick = gauss_newton_eigenvalues(model, functional.cross_entropy, data, rank_tol=1e-4)
    handle.remove()
    assert seen[0] == 8 and max(seen[1:]) < 8
    assert quick.values == pytest.approx(full.values, rel=1e-3)
    assert quick.conditions.samples == 8


def test_the_check_takes_the_exact_curvature_and_names_what_differs():
    model, (inputs, targets) = network("attention")
    data = (inputs, targets)
    loader = iter([(inputs[:3], targets[:3]), (inputs[3:], targets[3:])])  # can be read only once
    blocks = {"qk": ["q", "k"], "v": ["v"], "out": ["out"], "head": ["head"]}
    result = gauss_newton_eigenvalues(model, functional.cross_entropy, loader, blocks=blocks, rank_tol=0.0, check=True)
    for block, layers in blocks.items():
        H = dense_hessian(model, functional.cross_entropy, data, [f"{layer}.weight" for layer in layers])
        v = torch.cat([result.vectors[block][layer].reshape(-1) for layer in layers])
        assert result.checks[block] == pytest.approx(float(v @ H @ v), abs=1e-10)
    # Nothing but the loss curves the logits, so the last layer's two matrices are one; attention's are not.
    assert result.checks["head"] == pytest.approx(result.values["head"], rel=1e-9)
    assert "qk" in result.doubtful and "head" not in result.doubtful
    assert "doubtful" in str(result) and json.loads(result.to_json())["checks"] == result.checks
    assert gauss_newton_eigenvalues(model, functional.cross_entropy, data).checks == {}
