"""Prepared modules equal torch's over their options, keep their place, and quantize, pack and load as plain layers."""

import copy
import json
import pickle
import warnings
from typing import Any

import bantamweight as bw
import pytest
import torch
from bantamweight.errors import FormatError
from bantamweight.nn.prepare import prepare, prepare_like
from prepared_pairs import both, same
from torch import nn

ATTENTION = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"kdim": 5, "vdim": 3},
    {"kdim": 5, "vdim": 3, "bias": False, "batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True},
]


@pytest.mark.parametrize("options", ATTENTION)
@pytest.mark.parametrize("masks", ["none", "bool", "float", "per_head", "padding", "both", "causal"])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
@torch.no_grad()
def test_attention(options: dict[str, Any], masks: str) -> None:
    module = nn.MultiheadAttention(8, 2, **options)
    nn.init.normal_(module.out_proj.weight)
    if module.in_proj_bias is not None:
        nn.init.normal_(module.in_proj_bias)
    reference, prepared = both(module, "multihead_attention")
    batch, queries, keys = 3, 4, 4 if masks == "causal" else 6
    shape = (batch, queries) if options.get("batch_first") else (queries, batch)
    source = (batch, keys) if options.get("batch_first") else (keys, batch)
    q, k = torch.randn(*shape, 8), torch.randn(*source, module.kdim)
    v = torch.randn(*source, module.vdim)
    where = torch.rand(queries, keys) < 0.3
    where[:, 0] = False
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    padding[1, -2:] = True
    arguments: dict[str, Any] = {
        "none": {},
        "bool": {"attn_mask": where},
        "float": {"attn_mask": torch.randn(queries, keys), "key_padding_mask": padding.float() * -3},
        "per_head": {"attn_mask": torch.randn(batch * 2, queries, keys)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": where, "key_padding_mask": padding},
        "causal": {"attn_mask": torch.ones(queries, keys, dtype=torch.bool).triu(1), "is_causal": True},
    }[masks]
    for more in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        same(prepared(q, k, v, **arguments, **more), reference(q, k, v, **arguments, **more), tolerance=1e-5)
    if masks in ("none", "bool"):
        one = [x[0] if options.get("batch_first") else x[:, 0] for x in (q, k, v)]
        for more in ({}, {"need_weights": False}):
            same(prepared(*one, **arguments, **more), reference(*one, **arguments, **more), tolerance=1e-5)


@torch.no_grad()
def test_attention_answers_for_its_parameters_and_refuses_what_torch_refuses() -> None:
    reference, prepared = both(nn.MultiheadAttention(8, 2), "multihead_attention")
    same(prepared.in_proj_weight, reference.in_proj_weight)
    same(prepared.in_proj_bias, reference.in_proj_bias)
    assert prepared.out_proj.weight.shape == (8, 8) and prepared.bias_k is None and prepared.num_heads == 2
    x = torch.randn(4, 3, 8)
    for module in (reference, prepared):
        with pytest.raises(AssertionError, match="embedding dimension"):
            module(x[..., :6], x[..., :6], x[..., :6])
        with pytest.raises(RuntimeError, match="attn_mask"):
            module(x, x, x, attn_mask=torch.zeros(3, 3))
        with pytest.raises(RuntimeError, match="is_causal"):
            module(x, x, x, is_causal=True)
        with pytest.raises(AssertionError, match="2D or batched 3D"):
            module(x[0, 0], x[0, 0], x[0, 0])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_transformers_of_torch_run_on_prepared_attention(norm_first: bool, gradient: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
        whole = nn.Transformer(8, 2, 1, 1, 16, batch_first=True, norm_first=norm_first).eval()
    prepared, prepared_whole = copy.deepcopy(encoder), copy.deepcopy(whole)
    assert set(prepare(prepared).records) == {"layers.0.self_attn", "layers.1.self_attn"}
    assert len(prepare(prepared_whole).records) == 3
    x = torch.randn(3, 5, 8)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.set_grad_enabled(gradient):
        calls: list[int] = []
        prepared.layers[0].self_attn.query.register_forward_hook(lambda *_: calls.append(1))
        kept = ~padding[..., None]
        same(
            prepared(x, src_key_padding_mask=padding) * kept,
            encoder(x, src_key_padding_mask=padding) * kept,
            tolerance=1e-5,
        )
        causal = nn.Transformer.generate_square_subsequent_mask(5)
        same(prepared(x, mask=causal, is_causal=True), encoder(x, mask=causal, is_causal=True), tolerance=1e-5)
        assert len(calls) == 2
        same(prepared_whole(x, x, tgt_mask=causal), whole(x, x, tgt_mask=causal), tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_other_float_types(dtype: torch.dtype) -> None:
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-12}[dtype]
    for module, args in (
        (nn.LSTM(5, 6), (torch.randn(4, 2, 5),)),
        (nn.GRU(5, 6), (torch.randn(4, 2, 5),)),
        (nn.MultiheadAttention(8, 2), (torch.randn(4, 2, 8),) * 3),
        (nn.Conv1d(4, 4, 3), (torch.randn(2, 4, 9),)),
    ):
        module.to(dtype).eval()
        prepared = copy.deepcopy(module)
        prepare(prepared)
        args = tuple(x.to(dtype) for x in args)
        got, expected = prepared(*args), module(*args)
        same(got, expected, tolerance=tolerance)
        # and a prepared module is converted as any other
        assert all(p.dtype == torch.float32 for p in prepared.float().parameters())


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 12, 3, padding=1)
        self.lstm = nn.LSTM(12, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).transpose(1, 2)
        x, _ = self.lstm(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


CHILDREN = [
    "conv.conv",
    "lstm.input_l0",
    "lstm.hidden_l0",
    *(f"attention.{name}" for name in ("out_proj", "query", "key", "value")),
    "head",
]


@torch.no_grad()
def test_children_quantize_and_pack_as_plain_layers() -> None:
    net = Words().eval()
    expected = net(x := torch.randn(64, 8, 10))
    prepare(net)
    same(net(x), expected, tolerance=1e-5)
    small = bw.quantize(net, bw.GPFQ(bits=8), calibration=x, progress=False)
    assert {layer.name for layer in small.quantization.layers} == set(CHILDREN)
    assert float((small(x) - expected).norm() / expected.norm()) < 0.05
    packed = bw.pack(small)
    assert {r.name for r in packed.packing.layers if r.kernel} == set(CHILDREN)
    assert float((packed(x) - expected).norm() / expected.norm()) < 0.08
    same(small.lstm.weight_hh_l0, small.lstm.hidden_l0.weight)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@torch.no_grad()
def test_a_saved_network_loads_into_a_fresh_prepared_one(device: str, tmp_path: Any) -> None:
    net = Words().eval()
    records, x = prepare(net).records, torch.randn(32, 8, 10)
    packed = bw.pack(bw.quantize(net, bw.GPFQ(bits=4), calibration=x, ignore=["attention.key"], progress=False))
    bw.save(packed, tmp_path / "words.safetensors")
    with torch.device(device):
        fresh = Words()
    prepare_like(fresh, json.loads(json.dumps(records)))
    same(bw.load(tmp_path / "words.safetensors", fresh)(x), packed(x))


@torch.no_grad()
def test_an_encoder_of_torch_is_fused_around_its_prepared_attention() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    prepare(net)
    x = torch.randn(16, 6, 16)
    packed = bw.pack(bw.quantize(net, bw.GPFQ(bits=8), calibration=x, progress=False))
    assert len([record for record in packed.packing.layers if record.kernel]) == 12
    fused = bw.nn.fuse(packed)
    assert "PackedFFN" in repr(fused)
    same(fused(x), packed(x), tolerance=1e-4)


@torch.no_grad()
def test_identity_aliases_hooks_copies_and_pickles() -> None:
    net = Words().eval()
    net.again = net.lstm
    held, seen = [net.lstm, net.conv], []
    net.lstm.register_forward_hook(lambda *_: seen.append(1))
    net.lstm.note = "mine"
    found = prepare(net)
    assert list(found.records) == ["conv", "lstm", "attention"]  # each once, under its first name
    assert held[0] is net.lstm is net.again and held[1] is net.conv and net.lstm.note == "mine"
    x = torch.randn(2, 8, 10)
    expected = net(x)
    assert seen == [1] and not prepare(net).records
    net.lstm._forward_hooks.clear()  # a lambda cannot be pickled
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        same(twin(x), expected)
        assert twin.again is twin.lstm and twin.lstm.hidden_l0.weight is not net.lstm.hidden_l0.weight


@pytest.mark.parametrize("device", ["cpu", "meta"])
@torch.no_grad()
def test_prepare_like_brings_a_fresh_model_into_the_form(device: str) -> None:
    net = Words().eval()
    records = prepare(net).records
    with torch.device(device):
        fresh = Words().eval()
    prepare_like(fresh, records)
    fresh.load_state_dict(net.state_dict(), assign=True)
    x = torch.randn(2, 8, 10)
    same(fresh(x), net(x))


def test_prepare_like_refuses_what_does_not_fit_and_changes_nothing() -> None:
    net = Words()
    for records, match in (
        ({"lstm": {"kind": "lstm"}, "head": {"kind": "lstm"}}, "'head'.*is a Linear, not a LSTM"),
        ({"lstm": {"kind": "lstm"}, "nowhere": {"kind": "gru"}}, "'nowhere', which Words lacks"),
        ({"lstm": {"kind": "quantum"}}, "'quantum', which this version does not know"),
        ({"lstm": {}}, "None, which this version"),
        ({"lstm": {"kind": ["lstm"]}}, "which this version"),
    ):
        with pytest.raises(FormatError, match=match):
            prepare_like(net, records)
        assert type(net.lstm) is nn.LSTM


class Doubled(nn.LSTM):
    def forward(self, input: Any, hx: Any = None) -> Any:
        output, state = super().forward(input * 2, hx)
        return output + 1, state


class Louder(Doubled):
    def forward(self, input: Any, hx: Any = None) -> Any:
        return super().forward(input, hx)[0]


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x + super().forward(x, x, x, need_weights=False)[0]


class Upsampling(nn.ConvTranspose1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, output_size=[2 * x.shape[-1] + 1])


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: Doubled(4, 6), "lstm"),
        (lambda: Louder(4, 6), "lstm"),
        (lambda: SelfAttention(4, 2), "multihead_attention"),
        (lambda: Upsampling(4, 3, 2, stride=2, output_padding=1), "conv_transpose1d"),
    ],
)
@torch.no_grad()
def test_a_forward_that_hands_over_to_super_finds_the_prepared_one(make: Any, kind: str) -> None:
    reference, prepared = both(make(), kind)
    x, calls = torch.randn(3, 4, 4), []
    for child in prepared.modules():
        if type(child) in (nn.Linear, nn.Conv2d):
            child.register_forward_pre_hook(lambda *_: calls.append(1))
    same(prepared(x), reference(x))
    assert calls
    for child in prepared.modules():
        child._forward_pre_hooks.clear()
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        same(twin(x), reference(x))


@torch.no_grad()
def test_skip_and_reasons() -> None:
    class Own(nn.LSTM):
        def forward(self, input: Any, hx: Any = None) -> Any:
            return nn.LSTM.forward(self, input * 2, hx)

    class Named(nn.GRU):
        def twice(self) -> int:
            return 2 * self.hidden_size

    net = nn.ModuleDict(
        {
            "own": Own(4, 4),
            "named": Named(4, 4),
            "skipped": nn.Conv1d(4, 4, 1),
            "lazy": nn.LazyConv1d(4, 1),
            "complex": nn.Conv1d(4, 4, 1, dtype=torch.complex64),
            "normed": nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1)),
        }
    )
    found = prepare(net, skip=lambda name: name == "skipped")
    assert list(found.records) == ["named"] and type(net["skipped"]) is nn.Conv1d
    assert {name: reason.split()[-1] for name, reason in found.left.items()} == {
        "own": "own",
        "lazy": "first",
        "complex": "point",
        "normed": "first",
    }
    assert isinstance(net["named"], Named) and net["named"].twice() == 8
    x = torch.randn(3, 2, 4)
    same(copy.deepcopy(net["named"])(x), net["named"](x))


def test_a_transposed_linear_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    class Conv1D(nn.Module):  # what transformers.pytorch_utils has
        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.randn(nx, nf))
            self.bias = nn.Parameter(torch.randn(nf))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            size = (*x.size()[:-1], self.nf)
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)

    net = nn.Sequential(Conv1D(6, 4))
    with pytest.raises(FormatError, match="not a Linear"):
        prepare_like(net, {"0": {"kind": "transposed_linear"}})
    assert not prepare(net).records  # nobody has imported transformers
    module = types.ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    fresh, x = copy.deepcopy(net), torch.randn(2, 3, 4)
    expected, weight = net(x), net[0].weight
    records = prepare(net).records
    assert records == {"0": {"kind": "transposed_linear"}} and isinstance(net[0], Conv1D) and net[0].nf == 6
    calls = []
    net[0].linear.register_forward_hook(lambda *_: calls.append(1))
    same(net(x), expected)
    assert calls == [1]
    same(net[0].weight, weight)
    prepare_like(fresh, records)
    fresh.load_state_dict(net.state_dict())
    same(copy.deepcopy(fresh)(x), expected)
    assert "linear" in repr(net[0])


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_bilinear(bias: bool) -> None:
    reference, prepared = both(nn.Bilinear(4, 5, 6, bias=bias), "bilinear")
    for shape in ((3,), (2, 3), ()):
        x, y = torch.randn(*shape, 4), torch.randn(*shape, 5)
        same(prepared(x, y), reference(x, y), tolerance=1e-5)
    same(prepared.weight, reference.weight)
    for module in (reference, prepared):
        with pytest.raises(RuntimeError):
            module(torch.randn(3, 4), torch.randn(2, 5))
