"""Layers run together equal the same layers one by one."""

import copy

import pytest
import torch
from bantamweight import QuantizedWeight
from bantamweight.errors import BantamweightError, KernelError
from bantamweight.nn import PackedChain, PackedFFN, PackedLinear, PackedLinears, Stage
from bantamweight.ops import QuantizedRows, layer_norm_rows, quantize_rows
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def layer(n: int, k: int, levels: int = 16, group_size: int | None = None) -> PackedLinear:
    groups = 1 if group_size is None else -(-k // group_size)
    codes = torch.randint(0, levels, (n, k), dtype=torch.uint8)
    scale = torch.rand(n, groups) / levels / k**0.5
    weight = QuantizedWeight(
        codes=codes, scale=scale, zero=torch.full_like(scale, levels // 2), levels=levels, group_size=group_size or k
    )
    return PackedLinear(weight, torch.randn(n))


def norm(n: int) -> nn.LayerNorm:
    made = nn.LayerNorm(n)
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    return made.requires_grad_(False)


def assert_same_up_to_rounding(a: Tensor, b: Tensor) -> None:
    """A float on the edge between two int8 codes may fall either way; it moves its row by less than a percent."""
    assert a.shape == b.shape and a.dtype == b.dtype
    assert float((a - b).norm()) <= 2e-3 * float(b.norm())
    close = ((a - b).abs() <= 1e-4 * b.abs().max()).flatten(0, -2).all(-1)
    assert float(close.float().mean()) >= 0.5


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 5, 64), (400, 64)])
@torch.no_grad()
def test_ffn_equals_the_composition(activation: str, norm_first: bool, shape: tuple[int, ...]) -> None:
    first, second, after = layer(200, 64, group_size=16), layer(64, 200, 4), norm(64)
    ffn = PackedFFN(first, second, activation=activation, residual=True, norm=after, norm_first=norm_first)
    functions = {
        "none": lambda h: h,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    }
    x = torch.randn(shape)
    h = after(x) if norm_first else x
    y = x + second(functions[activation](first(h)))
    y = y if norm_first else after(y)
    if x.ndim == 1:
        y = y.unsqueeze(0)
        assert_same_up_to_rounding(ffn(x).unsqueeze(0), y)
    else:
        assert_same_up_to_rounding(ffn(x), y)
        assert_same_up_to_rounding(ffn(x.transpose(0, -2)).transpose(0, -2), y)  # not contiguous


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("residual", [None, "given"])
@pytest.mark.parametrize("group_size", [None, 64])
@torch.no_grad()
def test_many_rows_are_those_of_few(activation: str, residual: str | None, group_size: int | None) -> None:
    """Outputs that leave the caches, in whole tiles or not, get their epilogue elsewhere than those of few rows."""
    for width in (1088, 1100):
        chain = PackedChain(
            [Stage(linear=layer(width, 768, group_size=group_size), activation=activation, residual=residual)]
        )
        x, added = torch.randn(530, 768), None if residual is None else torch.randn(530, width)
        parts = [chain(x[i : i + 8], None if added is None else added[i : i + 8]) for i in range(0, len(x), 8)]
        assert torch.equal(chain(x, added), torch.cat(parts))
        rows = quantize_rows(torch.cat(parts))
        assert torch.equal(chain.run_rounded(x, added).dequantize(), rows.dequantize())


@torch.no_grad()
def test_no_rows_at_all() -> None:
    ffn = PackedFFN(layer(40, 24), layer(24, 40), residual=True, norm=norm(24))
    y, rows = ffn.run(torch.randn(2, 0, 24), group_size=8)
    assert y.shape == (2, 0, 24) and rows is not None and rows.dequantize().shape == (2, 0, 24)


@torch.no_grad()
def test_other_dtypes_come_back_as_they_came() -> None:
    ffn, x = PackedFFN(layer(40, 24), layer(24, 40), residual=True), torch.randn(3, 24)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(ffn(x.to(dtype)), ffn(x.to(dtype).float()).to(dtype))
    q, k = PackedLinears([layer(8, 24), layer(9, 24)])(x.bfloat16())
    assert q.dtype is torch.bfloat16 and k.shape == (3, 9)


@torch.no_grad()
def test_linears_equal_the_layers() -> None:
    layers = [layer(70, 48), layer(9, 48, 3), layer(65, 48, 256, group_size=16)]
    together = PackedLinears(layers)
    for shape in ((48,), (0, 48), (1, 48), (2, 7, 48), (130, 48)):
        x = torch.randn(shape)
        for rows in (x, quantize_rows(x), quantize_rows(x, 16)):
            outputs = together(rows)
            assert len(outputs) == 3 and all(torch.equal(y, one(x)) for y, one in zip(outputs, layers, strict=True))


@torch.no_grad()
def test_rounded_rows_stand_for_the_float_input() -> None:
    one, x = layer(33, 50, group_size=32), torch.randn(4, 3, 50)
    for group_size in (None, 32, 7):
        rows = quantize_rows(x, group_size)
        assert rows.shape == x.shape
        torch.testing.assert_close(rows.dequantize(), x, atol=float(x.abs().max()) / 250, rtol=0)
        assert torch.equal(one(rows), one(x))
    with pytest.raises(BantamweightError, match=r"takes rows of 50, but rows of \[2, 49\] came"):
        one(quantize_rows(torch.randn(2, 49)))


@torch.no_grad()
def test_chain_rounds_its_outputs_and_takes_rounded_ones() -> None:
    chain = PackedChain([Stage(linear=layer(90, 40), activation="gelu"), Stage(linear=layer(40, 90), residual="given")])
    x, given = torch.randn(70, 40), torch.randn(70, 40)
    y, rows = chain.run(x, given, group_size=16)
    assert isinstance(rows, QuantizedRows) and torch.equal(chain(x, given), y)
    expected = quantize_rows(y, 16)
    for a, b in ((chain.run_rounded(x, given, group_size=16), rows), (rows, expected)):
        size = 70 * 64
        assert torch.equal(a.q[:size], b.q[:size]) and torch.equal(a.scale, b.scale) and torch.equal(a.sums, b.sums)
    assert torch.equal(chain(quantize_rows(x), given), y)


@torch.no_grad()
def test_layer_norm_rows_equals_torch() -> None:
    x, residual, n = torch.randn(5, 6, 100) * 3, torch.randn(5, 6, 100), norm(100)
    y, rows = layer_norm_rows(x, n.weight, n.bias, n.eps, residual=residual, group_size=32)
    torch.testing.assert_close(y, n(x + residual), atol=2e-6, rtol=2e-6)
    assert torch.equal(rows.q[:-64], quantize_rows(y, 32).q[:-64])
    plain, _ = layer_norm_rows(x)
    torch.testing.assert_close(plain, F.layer_norm(x, (100,)), atol=2e-6, rtol=2e-6)
    with pytest.raises(BantamweightError, match=r"residual is \[6, 100\], but must be \[5, 6, 100\]"):
        layer_norm_rows(x, residual=residual[0])


@torch.no_grad()
def test_follows_what_happens_to_its_layers() -> None:
    first, second, after = layer(60, 32), layer(32, 60), norm(32)
    ffn, x = PackedFFN(first, second, residual=True, norm=after), torch.randn(4, 32)
    before = ffn(x)
    assert torch.equal(copy.deepcopy(ffn)(x), before)
    second.set_quantized(layer(32, 60).quantized)
    assert not torch.equal(ffn(x), before)
    assert_same_up_to_rounding(ffn(x), after(x + second(F.gelu(first(x)))))
    after.weight.data = after.weight.data * 2
    assert_same_up_to_rounding(ffn(x), after(x + second(F.gelu(first(x)))))
    other = PackedFFN(layer(60, 32), layer(32, 60), residual=True, norm=norm(32))
    other.load_state_dict(ffn.state_dict())
    assert torch.equal(other(x), ffn(x))


@torch.no_grad()
def test_compile_and_export_hold_the_layers_ops() -> None:
    ffn, x = PackedFFN(layer(60, 32), layer(32, 60), residual=True, norm=norm(32)), torch.randn(4, 32)
    assert_same_up_to_rounding(torch.compile(ffn, fullgraph=True)(x), ffn(x))
    exported = torch.export.export(ffn, (x,))
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum("bantamweight.lowbit_linear" in name for name in called) == 2
    assert_same_up_to_rounding(exported.module()(x), ffn(x))


def test_refuses_with_a_sentence() -> None:
    a, b, x = layer(60, 32), layer(32, 60), torch.randn(2, 32)
    ffn = PackedFFN(a, b, residual=True)
    with pytest.raises(BantamweightError, match=r"takes inputs \[..., 32\], but \[2, 31\] came"):
        ffn(torch.randn(2, 31))
    with pytest.raises(BantamweightError, match="for inference"):
        ffn(x.clone().requires_grad_())
    with pytest.raises(BantamweightError, match="adds or normalises its input"):
        ffn(quantize_rows(x))
    with pytest.raises(BantamweightError, match="a residual came"):
        ffn(x, x)
    with pytest.raises(KernelError, match="NaN or infinity"):
        ffn(torch.full((2, 32), float("nan")))
    given = PackedFFN(a, b, residual="given")
    with pytest.raises(BantamweightError, match="adds a residual, but none came"):
        given(x)
    with pytest.raises(BantamweightError, match=r"a residual of \[3, 32\] came with an input of \[2, 32\]"):
        given(x, torch.randn(3, 32))
    with pytest.raises(BantamweightError, match="stage 1 takes 32 inputs, but 60 come"):
        PackedFFN(a, a)
    with pytest.raises(BantamweightError, match="the activation of stage 0 is 'swish'"):
        PackedFFN(a, b, activation="swish")
    with pytest.raises(BantamweightError, match=r"must be an nn\.LayerNorm of 32"):
        PackedFFN(a, b, norm=nn.LayerNorm(31))
    with pytest.raises(BantamweightError, match="is a Linear, but must be a PackedLinear"):
        PackedFFN(nn.Linear(32, 60), b)  # type: ignore[arg-type]
    with pytest.raises(BantamweightError, match="cannot add the output of stage 0"):
        PackedChain([Stage(linear=a), Stage(linear=b, residual=0)])
    with pytest.raises(BantamweightError, match=r"these have \[32, 60\]"):
        PackedLinears([a, b])
