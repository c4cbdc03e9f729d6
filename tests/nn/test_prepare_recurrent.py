"""1d convolutions, recurrent layers and cells, prepared: equal to torch's over their options."""

import copy
import itertools
from typing import Any

import pytest
import torch
from bantamweight.nn.prepare import prepare
from prepared_pairs import both, same
from torch import nn

CONV1D = [
    dict(zip(("stride", "padding", "dilation", "groups", "padding_mode", "bias"), values, strict=True))
    for values in [
        (1, 0, 1, 1, "zeros", True),
        (2, 1, 1, 2, "zeros", False),
        (1, "same", 2, 1, "zeros", True),
        (1, "same", 1, 4, "circular", True),
        (3, "valid", 2, 1, "zeros", True),
        (2, 2, 1, 1, "reflect", True),
        (1, 3, 2, 2, "replicate", True),
    ]
]


@pytest.mark.parametrize("options", CONV1D)
@pytest.mark.parametrize("kernel", [1, 2, 3])
@torch.no_grad()
def test_conv1d(options: dict[str, Any], kernel: int) -> None:
    reference, prepared = both(nn.Conv1d(4, 8, kernel, **options), "conv1d")
    x = torch.randn(3, 4, 17)
    same(prepared(x), reference(x))
    if options["padding_mode"] == "zeros":
        same(prepared(x[0]), reference(x[0]))
    same(prepared.weight, reference.weight)
    assert prepared.kernel_size == (kernel,) and (prepared.bias is None) == (reference.bias is None)


RECURRENT = list(itertools.product([1, 2], [False, True], [False, True], [False, True]))


def recurrent(kind: str, layers: int, bidirectional: bool, batch_first: bool, bias: bool, **more: Any) -> nn.Module:
    options = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first, "bias": bias, **more}
    if kind == "rnn_relu":
        return nn.RNN(5, 6, nonlinearity="relu", **options)
    return {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind](5, 6, **options)


def first_state(module: Any, *batch: int) -> Any:
    layers = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(layers, *batch, module.proj_size or module.hidden_size)
    return (h, torch.randn(layers, *batch, module.hidden_size)) if isinstance(module, nn.LSTM) else h


@pytest.mark.parametrize("options", RECURRENT)
@pytest.mark.parametrize("kind", ["lstm", "lstm_projected", "gru", "rnn", "rnn_relu"])
@torch.no_grad()
def test_recurrent(kind: str, options: tuple[int, bool, bool, bool]) -> None:
    more = {"proj_size": 3} if kind == "lstm_projected" else {}
    module = recurrent(kind.removesuffix("_projected"), *options, **more)
    reference, prepared = both(module, kind.split("_")[0])
    x = torch.randn(3, 7, 5) if options[2] else torch.randn(7, 3, 5)
    for state in (None, first_state(reference, 3)):
        same(prepared(x, state), reference(x, state))
    for state in (None, first_state(reference)):
        same(prepared(x[0], state), reference(x[0], state))
    lengths = torch.tensor([2, 7, 4])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=options[2], enforce_sorted=False)
    for state in (None, first_state(reference, 3)):
        got, expected = prepared(packed, state), reference(packed, state)
        same(got[0].data, expected[0].data)
        same(got[1], expected[1])
        assert torch.equal(got[0].batch_sizes, expected[0].batch_sizes)
        assert torch.equal(got[0].unsorted_indices, expected[0].unsorted_indices)
    for name, parameter in reference.named_parameters():
        same(getattr(prepared, name), parameter)
    assert [[w.shape for w in part] for part in prepared.all_weights] == [
        [w.shape for w in part] for part in reference.all_weights
    ]


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_recurrent_trains_as_torch(kind: str) -> None:
    reference, prepared = both(recurrent(kind, 2, True, True, True), kind)
    x = torch.randn(3, 7, 5)
    reference(x)[0].square().sum().backward()
    prepared(x)[0].square().sum().backward()
    same(prepared.hidden_l1_reverse.weight.grad, reference.weight_hh_l1_reverse.grad, tolerance=1e-4)
    same(prepared.input_l0.weight.grad, reference.weight_ih_l0.grad, tolerance=1e-4)
    dropped = recurrent(kind, 2, False, True, True, dropout=1.0).train()
    one = copy.deepcopy(dropped)
    prepare(one)
    same(one(x)[0], dropped(x)[0])  # all of the first layer's output is dropped


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@torch.no_grad()
def test_recurrent_on_no_sequences_and_under_autocast(kind: str) -> None:
    reference, prepared = both(recurrent(kind, 2, True, False, True), kind)
    assert prepared(torch.randn(4, 0, 5))[0].shape == reference(torch.randn(4, 0, 5))[0].shape == (4, 0, 12)
    x = torch.randn(4, 2, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(prepared(x)[0].float(), reference(x)[0].float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@torch.no_grad()
def test_recurrent_refuses_what_torch_refuses(kind: str) -> None:
    reference, prepared = both(recurrent(kind, 1, False, False, True), kind)
    wrong = [
        ((torch.randn(7, 3, 4),), RuntimeError, "must be equal to input_size"),
        ((torch.randn(7),), ValueError, "2D or 3D"),
        ((torch.randn(7, 3, 5).double(),), ValueError, "dtype"),
        ((torch.randn(7, 3, 5), first_state(reference, 2)), RuntimeError, "Expected hidden"),
        ((torch.randn(7, 3, 5), first_state(reference)), RuntimeError, "should also be"),
        ((torch.randn(0, 3, 5),), RuntimeError, "larger than 0"),
    ]
    for args, error, match in wrong:
        for module in (reference, prepared):
            with pytest.raises(error, match=match):
                module(*args)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["lstm_cell", "gru_cell", "rnn_cell", "rnn_relu"])
@torch.no_grad()
def test_cells(kind: str, bias: bool) -> None:
    classes = {"lstm_cell": nn.LSTMCell, "gru_cell": nn.GRUCell, "rnn_cell": nn.RNNCell}
    cell = nn.RNNCell(5, 6, bias, "relu") if kind == "rnn_relu" else classes[kind](5, 6, bias)
    reference, prepared = both(cell, "rnn_cell" if kind == "rnn_relu" else kind)
    x, h = torch.randn(3, 5), torch.randn(3, 6)
    state = (h, torch.randn(3, 6)) if kind == "lstm_cell" else h
    one = tuple(part[0] for part in state) if kind == "lstm_cell" else h[0]
    for args in ((x,), (x, state), (x[0],), (x[0], one)):
        same(prepared(*args), reference(*args))
    same(prepared.weight_hh, reference.weight_hh)
    for module in (reference, prepared):
        with pytest.raises(ValueError, match="1D or 2D"):
            module(torch.randn(1, 3, 5))
        with pytest.raises(RuntimeError):
            module(x, (h[:2], h[:2]) if kind == "lstm_cell" else h[:2])
