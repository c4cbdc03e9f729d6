import json

import bantamweight as bw
import numpy as np
import pytest
import torch
from bantamweight.curvature import Sensitivity, sensitivity
from bantamweight.errors import CalibrationError, FormatError
from small_networks import dense_hessian, network
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

LAYERS = ["conv", "pointwise", "head"]


def weight_blocks(model, data):
    return {name: dense_hessian(model, functional.cross_entropy, data, [f"{name}.weight"]) for name in LAYERS}


def test_lambda_max_and_omega_equal_the_dense_hessian():
    model, data = network("conv")
    dense = {name: torch.linalg.eigvalsh(H) for name, H in weight_blocks(model, data).items()}
    largest = sensitivity(model, functional.cross_entropy, data, subsets=1, tol=1e-12)
    assert largest.scores == pytest.approx({name: float(v[-1]) for name, v in dense.items()}, rel=1e-6)
    omega = sensitivity(model, functional.cross_entropy, data, metric="omega", subsets=1, tol=1e-12)
    assert omega.scores == pytest.approx({name: float(v.abs().max()) for name, v in dense.items()}, rel=1e-6)
    assert largest.converged and largest.products > 0 and largest.samples == 8


def test_trace_is_the_mean_eigenvalue():
    model, data = network("conv")
    result = sensitivity(model, functional.cross_entropy, data, metric="trace", subsets=1, products=3000)
    for layer in result.layers:
        H = dense_hessian(model, functional.cross_entropy, data, [f"{layer.name}.weight"])
        assert layer.values[0] == pytest.approx(float(H.trace()), rel=0.25)
        assert layer.score == pytest.approx(layer.values[0] / layer.weights)
    assert result.products == 3000


def test_subsets_give_mean_and_spread():
    torch.manual_seed(0)
    model, _ = network("conv")
    loader = DataLoader(TensorDataset(torch.randn(40, 2, 4, 4).double(), torch.randint(0, 3, (40,))), batch_size=7)
    result = sensitivity(model, functional.cross_entropy, loader, metric="omega", subsets=5, fraction=0.25)
    assert result.samples == 10 and result.subsets == 5
    for layer in result.layers:
        assert len(set(layer.values)) == 5
        assert layer.std == pytest.approx(np.std(layer.values, ddof=1))
        assert layer.score == pytest.approx(abs(np.mean(layer.values)) + layer.std)  # Q-BERT's Omega
    again = sensitivity(model, functional.cross_entropy, loader, metric="omega", subsets=5, fraction=0.25)
    assert again.to_json() == result.to_json()


def test_one_pass_score_of_the_last_layer_is_exact():
    """Cross-entropy is linear in nothing but the logits, so there the two curvatures are one."""
    model, data = network("mlp")
    exact = sensitivity(model, functional.cross_entropy, data, subsets=1, tol=1e-12)
    quick = sensitivity(model, functional.cross_entropy, data, subsets=1, metric="ggn", check=False)
    assert quick.doubtful is None and exact.doubtful is None
    assert quick.products == 0 and set(quick.scores) == set(exact.scores)
    assert quick.scores["4"] == pytest.approx(exact.scores["4"], rel=2e-3)


def test_one_pass_scores_name_the_layers_they_may_misjudge():
    model, data = network("attention")
    result = sensitivity(model, functional.cross_entropy, data, subsets=1, metric="ggn")
    assert result.products == len(result.layers) == 5  # one a layer
    assert result.doubtful and "head" not in result.doubtful
    assert all(name in str(result).partition("doubtful")[2] for name in result.doubtful)
    assert Sensitivity.from_json(result.to_json()).doubtful == result.doubtful


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)) for _ in range(3)])
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def test_blocks_as_q_bert_takes_them():
    torch.manual_seed(0)
    model, data = Encoder().double(), (torch.randn(16, 4).double(), torch.randint(0, 3, (16,)))
    result = sensitivity(model, functional.cross_entropy, data, per="block", subsets=1, tol=1e-12)
    assert [layer.name for layer in result.layers] == ["embed", "layers.0", "layers.1", "layers.2", "head"]
    middle = result.layers[2]
    assert middle.layers == ("layers.1.0", "layers.1.2") and middle.weights == 72 and middle.macs == 72
    names = ["layers.1.0.weight", "layers.1.2.weight"]
    H = dense_hessian(model, functional.cross_entropy, data, names)
    assert middle.score == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-6)
    named = sensitivity(model, functional.cross_entropy, data, blocks={"mine": ["layers.1"]}, subsets=1, tol=1e-12)
    assert named.scores["mine"] == pytest.approx(middle.score)
    assert named.per == "blocks"
    plan = bw.plan(result, average_bits=4)
    assert plan.bits["layers.1.0"] == plan.bits["layers.1.2"] and len(plan.bits) == 8


def test_counts_of_multiply_adds():
    model, data = network("conv")
    result = sensitivity(model, functional.cross_entropy, data, metric="ggn", subsets=1)
    assert {layer.name: layer.macs for layer in result.layers} == {
        "conv": 16 * 3 * 18, "pointwise": 4 * 4 * 3, "head": 3 * 4
    }  # fmt: skip


def test_json_both_ways_text_and_picture(tmp_path):
    model, data = network("conv")
    result = bw.sensitivity(model, functional.cross_entropy, data, metric="omega", subsets=2, fraction=0.5)
    loaded = Sensitivity.from_json(result.to_json(tmp_path / "s.json"))
    assert loaded.to_json() == result.to_json() == (tmp_path / "s.json").read_text().rstrip("\n")
    assert bw.plan(loaded, average_bits=3).bits == bw.plan(result, average_bits=3).bits
    assert all(name in str(result) for name in LAYERS) and "2 subsets of 4 samples" in str(result)
    for text in ["{}", "[", '{"kind": "Trace", "version": 1}', json.dumps({**json.loads(result.to_json()), "x": 1})]:
        with pytest.raises(FormatError):
            Sensitivity.from_json(text)
    pytest.importorskip("matplotlib")
    figure = result.plot(tmp_path / "s.png")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == LAYERS


def test_eigenvalues_that_did_not_converge_are_returned_and_said():
    model, data = network("conv")
    result = sensitivity(model, functional.cross_entropy, data, subsets=1, tol=1e-12, max_products=2)
    assert not result.converged and "NOT all converged" in str(result)
    assert all(np.isfinite(layer.score) for layer in result.layers) and len(result.layers) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metric": "snr"}, "'snr', but must be one of lambda_max"),
        ({"subsets": 0}, r"subsets \(0\)"),
        ({"fraction": 1.5}, r"fraction \(1\.5\)"),
        ({"per": "neuron"}, "per is 'neuron'"),
        ({"ignore": [".*"]}, "no linear or 2d convolution layer"),
        ({"ignore": ["("]}, "no regular expression"),
        ({"blocks": {"a": ["nothing"]}}, r"block 'a' \(nothing\)"),
        ({"blocks": {"a": ["conv"], "b": ["conv"]}}, "conv is in more than one block"),
    ],
)
def test_bad_input_gets_a_sentence(change, words):
    model, data = network("conv")
    with pytest.raises(ValueError, match=words):
        sensitivity(model, functional.cross_entropy, data, **{"subsets": 1, **change})


def test_batches_of_different_shapes_cannot_be_cut():
    model = nn.Conv2d(1, 2, 3).double()
    batches = [(torch.randn(3, 1, n, n).double(), torch.zeros(3).long()) for n in (4, 5)]
    loss = lambda z, y: functional.cross_entropy(z.mean((2, 3)), y)  # noqa: E731
    with pytest.raises(CalibrationError, match="pad them to one shape"):
        sensitivity(model, loss, batches, subsets=2)
    assert sensitivity(model, loss, batches, subsets=1).converged


def test_a_layer_that_is_never_called():
    model, data = network("conv")
    model.spare = nn.Linear(2, 2).double()
    with pytest.raises(ValueError, match="spare is never called"):
        sensitivity(model, functional.cross_entropy, data, subsets=1)
