"""Embedding tables in the driver: opt-in, rounded row by row, before the layers that read them are calibrated."""

import pytest
import torch
from bantamweight import GPFQ, QuantizedWeight, RoundToNearest, quantize
from bantamweight.errors import BantamweightError, UnsupportedLayerError
from bantamweight.nn import SimulatedEmbedding, SimulatedLinear
from bantamweight.quantize import quantize_embedding
from torch import nn


class Tagger(nn.Module):
    def __init__(self, **options: float) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(32, 5)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(index).mean(1))


class UntraceableTagger(Tagger):
    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return super().forward(index if bool((index >= 0).all()) else -index)


def test_each_entry_is_the_nearest_of_its_row() -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(5000, 24)  # more rows than are rounded at a time
    with torch.no_grad():
        layer.weight *= torch.rand(5000, 1) + 0.1
    weight = layer.weight.detach()
    table, error = quantize_embedding(layer, RoundToNearest(bits=4))
    step = weight.abs().amax(1, keepdim=True) / 7
    assert table.levels == 15 and torch.allclose(table.scale, step)
    assert ((table.dequantize() - weight).abs() <= 0.5001 * step).all()
    assert error == pytest.approx(float((table.dequantize() - weight).norm() / weight.norm()), rel=1e-4)


def test_groups_and_searched_steps() -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(200, 70)
    plain, plain_error = quantize_embedding(layer, RoundToNearest(bits=2))
    searched, searched_error = quantize_embedding(layer, RoundToNearest(bits=2, steps=(0.5, 0.7, 1.0)))
    grouped, _ = quantize_embedding(layer, RoundToNearest(bits=2, group_size=32))
    assert searched_error < plain_error and plain.scale.shape == (200, 1)
    assert grouped.scale.shape == (200, 3) and grouped.group_size == 32
    # Every row has the best of its candidates, which the plain one is among.
    weight = layer.weight.detach()
    assert (
        (searched.dequantize() - weight).square().sum(1) <= (plain.dequantize() - weight).square().sum(1) * 1.0001
    ).all()


def test_rows_that_share_a_scale() -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(4500, 16)
    table, _ = quantize_embedding(layer, RoundToNearest(bits=4, alphabet="full", steps=(0.7, 1.0), rows_per_scale=7))
    for part in (table.scale, table.zero):
        assert all(bool((group == group[0]).all()) for group in part.split(7))
    assert len(table.scale.unique()) > 100


def test_the_driver_leaves_tables_in_float_unless_asked() -> None:
    torch.manual_seed(0)
    net, data = Tagger(), torch.randint(0, 50, (64, 9))
    small = quantize(net, RoundToNearest(bits=4), calibration=data)
    assert isinstance(small.words, nn.Embedding)
    assert [(s.name, s.reason) for s in small.quantization.skipped] == [("words", "embeddings is None")]
    small = quantize(net, RoundToNearest(bits=4), calibration=data, embeddings=RoundToNearest(bits=8))
    assert isinstance(small.words, SimulatedEmbedding) and isinstance(small.head, SimulatedLinear)
    assert [(x.name, x.kind, x.scheme) for x in small.quantization.layers] == [
        ("words", "Embedding", "W8"),
        ("head", "Linear", "W4"),
    ]
    overridden = quantize(
        net,
        RoundToNearest(bits=4),
        calibration=data,
        embeddings=RoundToNearest(bits=8),
        overrides={"words": RoundToNearest(bits=3)},
    )
    assert overridden.words.scheme == "W3"
    with pytest.raises(BantamweightError, match="ignore names 'nothing'"):
        quantize(net, GPFQ(), calibration=data, embeddings=GPFQ(), ignore=["nothing"])


@pytest.mark.parametrize("traceable", [True, False])
def test_later_layers_are_calibrated_on_the_rounded_table(traceable: bool) -> None:
    """The bias correction of a head behind a coarse table makes up for the table's error in the mean."""
    torch.manual_seed(0)
    net, data = Tagger() if traceable else UntraceableTagger(), torch.randint(0, 50, (400, 3))
    small = quantize(net, GPFQ(bits=8), calibration=data, embeddings=RoundToNearest(levels=3))
    assert small.quantization.mode == "one pass"
    with torch.no_grad():
        exact = small.head.weight @ small.words(data).mean(1).T  # without the bias
        wanted = net.head.weight @ net.words(data).mean(1).T + net.head.bias[:, None]
        assert torch.allclose((wanted - exact).mean(1), small.head.bias, atol=0.02)
        assert (small.head.bias - net.head.bias).abs().max() > 0.005


def test_what_cannot_be_a_table_of_codes() -> None:
    data = torch.randint(0, 50, (64, 9))
    with pytest.raises(UnsupportedLayerError, match="layer 'words' is a Embedding, which cannot be quantized"):
        quantize(Tagger(max_norm=1.0), GPFQ(), calibration=data, embeddings=GPFQ(), strict=True)
    broken = Tagger()
    with torch.no_grad():
        broken.words.weight[3, 4] = float("nan")
    with pytest.raises(BantamweightError, match="the weight of layer 'words' holds NaN"):
        quantize(broken, GPFQ(), calibration=data, embeddings=GPFQ())
    with pytest.raises(BantamweightError, match="is empty or holds NaN"):
        quantize_embedding(broken.words, GPFQ())


def test_a_model_of_tables_alone() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 8)

        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return self.words(index).sum(1)

    small = quantize(Bag(), GPFQ(), calibration=torch.randint(0, 20, (8, 3)), embeddings=RoundToNearest(bits=8))
    assert isinstance(small.words.quantized, QuantizedWeight)
