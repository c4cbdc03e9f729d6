"""Weights that several layers share: measured once, with all their uses."""

import pytest
import torch
from bantamweight import plan
from bantamweight.curvature import sensitivity
from bantamweight.errors import BantamweightError, UnsupportedLayerError
from small_networks import dense_hessian
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm


class Language(nn.Module):
    """Its head is its embedding, as BERT's, GPT-2's and T5's are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embedding(tokens)))).mean(1)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def language() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Language().double(), (torch.randint(0, 7, (12, 5)), torch.randint(0, 7, (12,)))


def twice() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Twice().double(), (torch.randn(12, 4).double(), torch.randint(0, 3, (12,)))


def top(model: nn.Module, data: tuple[Tensor, Tensor], *weights: str) -> float:
    return float(torch.linalg.eigvalsh(dense_hessian(model, functional.cross_entropy, data, list(weights)))[-1])


def test_a_head_tied_to_the_embedding():
    model, data = language()
    found = sensitivity(model, functional.cross_entropy, data, subsets=1, tol=1e-12)
    assert [layer.layers for layer in found.layers] == [("middle",), ("head",)]
    assert found.scores["head"] == pytest.approx(top(model, data, "embedding.weight"), rel=1e-6)


def test_tied_layers_are_one_record_and_get_the_same_bits():
    model, data = twice()
    found = sensitivity(model, functional.cross_entropy, data, subsets=1, tol=1e-12)
    assert [layer.layers for layer in found.layers] == [("first", "second"), ("head",)]
    assert found.scores["first"] == pytest.approx(top(model, data, "first.weight"), rel=1e-6)
    first = found.layers[0]
    assert first.weights == 16 and first.macs == 32 and first.shapes == ((4, 4), (4, 4))
    bits = plan(found, average_bits=4.0).bits
    assert bits["first"] == bits["second"]


def test_blocks_of_tied_layers():
    model, data = twice()
    blocks = {"body": ["second", "first"], "end": ["head"]}
    found = sensitivity(model, functional.cross_entropy, data, subsets=1, blocks=blocks, tol=1e-12)
    assert found.scores["body"] == pytest.approx(top(model, data, "first.weight"), rel=1e-6)
    alone = sensitivity(model, functional.cross_entropy, data, subsets=1, blocks={"one": ["second"]}, tol=1e-12)
    assert alone.layers[0].layers == ("second",) and alone.scores["one"] == pytest.approx(found.scores["body"])
    with pytest.raises(BantamweightError, match="first and second share one weight, but are in different blocks"):
        sensitivity(model, functional.cross_entropy, data, subsets=1, blocks={"a": ["first"], "b": ["second"]})


def test_an_ignored_tied_layer_leaves_the_other():
    model, data = twice()
    found = sensitivity(model, functional.cross_entropy, data, subsets=1, ignore=["first"], tol=1e-12)
    assert [layer.layers for layer in found.layers] == [("second",), ("head",)]


@pytest.mark.parametrize(
    ("make", "pair"), [(language, "'head' shares its weight with 'embedding'"), (twice, "'first'")]
)
def test_the_one_pass_metric_refuses_tied_weights(make, pair):
    model, data = make()
    with pytest.raises(UnsupportedLayerError, match=pair):
        sensitivity(model, functional.cross_entropy, data, subsets=1, metric="ggn")


def test_a_computed_weight_is_named():
    model, data = twice()
    model.head = weight_norm(model.head)  # type: ignore[assignment]
    with pytest.raises(UnsupportedLayerError, match="the weight of layer 'head' is computed from other parameters"):
        sensitivity(model, functional.cross_entropy, data, subsets=1)
