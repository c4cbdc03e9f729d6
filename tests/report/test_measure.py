import pytest
import torch
from bantamweight.errors import BantamweightError
from bantamweight.report import measure
from safetensors.torch import save
from torch import nn


class Says(nn.Module):
    """Logits that put the largest at the class in column 0."""

    def forward(self, x):
        return nn.functional.one_hot(x[:, 0].long(), 10).float()


def test_accuracy_counts_every_row_once():
    said = torch.arange(1000).remainder(10)
    labels = said.clone()
    labels[::8] = (labels[::8] + 1) % 10  # 125 of 1,000 wrong
    assert measure.accuracy(Says(), said[:, None].float(), labels) == 0.875


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(BantamweightError, match="NaN or infinite logits"):
        measure.accuracy(nn.Linear(3, 2), torch.full((4, 3), float("nan")), torch.zeros(4, dtype=torch.int64))


def test_latency_runs_models_in_turns_on_the_asked_batch():
    seen = []

    class Notes(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            seen.append((self.name, x.shape[0]))
            return x

    found = measure.latency({"a": Notes("a"), "b": Notes("b")}, torch.zeros(3, 2), 8, seconds=0.0)
    assert list(found) == ["a", "b"] and all(ms > 0 for ms in found.values())
    assert seen == [("a", 8)] * 2 + [("b", 8)] * 2 + [("a", 8), ("b", 8)] * 5


def test_float_bytes_are_those_of_a_saved_state_dict():
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    assert measure.float_bytes(model) == len(save(model.state_dict()))


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    untied = measure.float_bytes(model)
    model[1].weight = model[0].weight
    assert untied - measure.float_bytes(model) >= 4 * 64 * 64
