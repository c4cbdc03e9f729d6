import copy

import pytest
import torch
from bantamweight.curvature import Hessian
from bantamweight.errors import CalibrationError, UnsupportedLayerError
from small_networks import dense_hessian, network
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


def dense_of(hessian):
    return torch.stack([hessian @ row for row in torch.eye(hessian.size, dtype=hessian.dtype)])


@pytest.mark.parametrize("differentiation", ["double_backward", "forward_over_reverse"])
def test_product_equals_the_dense_hessian(case, differentiation):
    model, loss_fn, data = case
    hessian = Hessian(model, loss_fn, data, differentiation=differentiation)
    expected = dense_hessian(model, loss_fn, data)
    torch.testing.assert_close(dense_of(hessian), expected, rtol=0, atol=1e-8)
    assert hessian.conditions.differentiation == differentiation
    assert hessian.products == hessian.size


def test_gradient_and_loss(case):
    model, loss_fn, (inputs, targets) = case
    hessian = Hessian(model, loss_fn, (inputs, targets))
    model.eval()
    loss = loss_fn(model(inputs), targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(hessian.gradient(), torch.cat([g.reshape(-1) for g in gradients]))
    assert hessian.loss == pytest.approx(float(loss.detach()), abs=1e-12)


@pytest.mark.parametrize("graph_memory", [0, None], ids=["rebuilt", "kept"])
def test_uneven_batches_give_the_whole_batch(case, graph_memory):
    model, loss_fn, (inputs, targets) = case
    batches = [(inputs[:3], targets[:3]), (inputs[3:4], targets[3:4]), (inputs[4:], targets[4:])]
    hessian = Hessian(model, loss_fn, batches, graph_memory=graph_memory)
    assert len(hessian._loss._graphs) == (1 if graph_memory == 0 else 3)
    torch.testing.assert_close(dense_of(hessian), dense_hessian(model, loss_fn, (inputs, targets)), rtol=0, atol=1e-8)
    assert hessian.conditions.samples == 8 and hessian.conditions.batches == 3


def test_a_shuffling_loader_gives_one_fixed_matrix():
    model, (inputs, targets) = network("mlp")
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=3, shuffle=True)
    dense = dense_of(Hessian(model, functional.cross_entropy, loader, graph_memory=0))
    torch.testing.assert_close(
        dense, dense_hessian(model, functional.cross_entropy, (inputs, targets)), rtol=0, atol=1e-8
    )


def test_blocks_are_diagonal_blocks(case):
    model, loss_fn, data = case
    hessian = Hessian(model, loss_fn, data)
    for name in hessian.names:
        block = hessian.block(name)
        assert block.names == [name]
        expected = dense_hessian(model, loss_fn, data, [name])
        torch.testing.assert_close(dense_of(block), expected, rtol=0, atol=1e-8)


def test_blocks_by_module_and_by_expression():
    model, data = network("attention")
    hessian = Hessian(model, functional.cross_entropy, data, blocks=["q", r"[kv]"])
    assert hessian.names == ["q.weight", "q.bias", "k.weight", "k.bias", "v.weight", "v.bias"]
    expected = dense_hessian(model, functional.cross_entropy, data, hessian.names)
    torch.testing.assert_close(dense_of(hessian), expected, rtol=0, atol=1e-8)


def test_eval_mode_is_the_default_and_every_modules_mode_is_put_back():
    model, data = network("conv")
    model.train()
    model.norm.eval()
    hessian = Hessian(model, functional.cross_entropy, data, graph_memory=0)
    assert hessian.conditions.mode == "eval" and "evaluation mode" in str(hessian.conditions)
    assert model.training and model.drop.training and not model.norm.training


@pytest.mark.parametrize("graph_memory", [0, None])
def test_train_mode_uses_batch_statistics_and_leaves_no_trace(graph_memory):
    model, data = network("conv")
    model.drop.p = 0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    expected = dense_hessian(copy.deepcopy(model), functional.cross_entropy, data, train=True)
    hessian = Hessian(model, functional.cross_entropy, data, mode="train", graph_memory=graph_memory)
    torch.testing.assert_close(dense_of(hessian), expected, rtol=0, atol=1e-8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_train_mode_is_symmetric_under_dropout():
    model, (inputs, targets) = network("conv")
    data = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    dense = dense_of(Hessian(model, functional.cross_entropy, data, mode="train", graph_memory=0))
    torch.testing.assert_close(dense, dense.T, rtol=0, atol=1e-10)


class OnceDifferentiable(torch.autograd.Function):
    """x^3 with a forward derivative, and a backward that cannot be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 3 * x**2

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return tangent * 3 * x**2


class Cubed(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(5, 3).double()
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


def test_falls_back_to_forward_over_reverse():
    _, data = network("mlp")
    model = Cubed(OnceDifferentiable.apply)
    plain = Cubed(lambda x: x**3)
    plain.load_state_dict(model.state_dict())
    hessian = Hessian(model, functional.cross_entropy, data)
    torch.testing.assert_close(
        dense_of(hessian), dense_hessian(plain, functional.cross_entropy, data), rtol=0, atol=1e-8
    )
    assert hessian.conditions.differentiation == "forward_over_reverse"
    with pytest.raises(UnsupportedLayerError, match=r"no double backward.*differentiation="):
        Hessian(model, functional.cross_entropy, data, differentiation="double_backward") @ torch.zeros(
            hessian.size
        ).double()


def test_a_linear_loss_has_the_zero_hessian():
    model = nn.Linear(3, 1).double()
    data = (torch.randn(4, 3, dtype=torch.float64), torch.zeros(4))
    hessian = Hessian(model, lambda output, _: output.mean(), data)
    assert not (hessian @ torch.ones(4, dtype=torch.float64)).any()


def test_inputs_as_tuple_and_as_mapping():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2).double()

        def forward(self, a, b=None, labels=None):
            return self.linear(a * b)

    model = Two()
    a, b, y = torch.randn(4, 3).double(), torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0])
    expected = dense_of(Hessian(model, functional.cross_entropy, ((a, b), y)))
    mapped = dense_of(Hessian(model, functional.cross_entropy, [{"a": a, "b": b, "labels": y}]))
    keyed = dense_of(Hessian(model, functional.cross_entropy, ({"a": a, "b": b}, y)))
    torch.testing.assert_close(expected, mapped)
    torch.testing.assert_close(expected, keyed)
    assert expected.any()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"data": []}, CalibrationError, "no batch"),
        ({"data": DataLoader(TensorDataset(torch.ones(0, 5)))}, CalibrationError, "no batch"),
        ({"data": 3}, CalibrationError, "must be a batch"),
        ({"data": [torch.ones(2, 5)]}, CalibrationError, r"batch 0 is a Tensor"),
        ({"data": [{"x": torch.ones(1)}]}, CalibrationError, "without 'labels'"),
        ({"data": (torch.ones(0, 5).double(), torch.ones(0).long())}, CalibrationError, "no sample"),
        (
            {"loss_fn": lambda o, t: functional.cross_entropy(o, t, reduction="none")},
            CalibrationError,
            r"\(8,\).*scalar",
        ),
        ({"loss_fn": lambda o, t: 1.0}, CalibrationError, "a float"),
        ({"loss_fn": lambda o, t: o.sum() * float("nan")}, CalibrationError, "loss of batch 0 is nan"),
        ({"loss_fn": lambda o, t: torch.tensor(1.0)}, CalibrationError, "does not depend"),
        ({"blocks": "nothing"}, ValueError, "'nothing' matches no parameter"),
        ({"blocks": "(["}, ValueError, "neither a name nor"),
        ({"blocks": []}, ValueError, "blocks is empty"),
        ({"mode": "test"}, ValueError, "'eval' or 'train'"),
        ({"differentiation": "finite"}, ValueError, "double_backward"),
    ],
)
def test_bad_input_gets_a_sentence(change, error, words):
    model, data = network("mlp")
    arguments = {"loss_fn": functional.cross_entropy, "data": data, **change}
    with pytest.raises(error, match=words):
        Hessian(model, **arguments)


def test_no_parameter_that_requires_grad():
    model, data = network("mlp")
    with pytest.raises(ValueError, match="no parameter of the model requires grad"):
        Hessian(model.requires_grad_(False), functional.cross_entropy, data)


def test_wrong_vector_and_unsupported_operation():
    _, data = network("mlp")

    class NoForward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * 2

    hessian = Hessian(Cubed(NoForward.apply), functional.cross_entropy, data)
    with pytest.raises(ValueError, match=r"shape \(3,\).*needs \(18,\)"):
        hessian @ torch.zeros(3)
    with pytest.raises(UnsupportedLayerError, match="neither a double backward nor a forward derivative"):
        hessian @ torch.ones(18, dtype=torch.float64)
