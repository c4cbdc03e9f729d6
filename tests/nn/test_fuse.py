"""Fused transformer blocks equal the packed ones they replace."""

import copy
from typing import Any

import bantamweight as bw
import pytest
import torch
from bantamweight.errors import BantamweightError
from bantamweight.nn import FusedBertLayer, FusedEncoderLayer, PackedLinear, fuse
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

WIDTH, HEADS = 32, 4


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = HEADS, WIDTH // HEADS
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        scores = q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        probabilities = (scores if mask is None else scores + mask).softmax(-1)
        return (probabilities @ v).transpose(1, 2).flatten(2), None


class Output(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inputs, WIDTH), nn.LayerNorm(WIDTH, eps=1e-12)
        nn.init.normal_(self.LayerNorm.weight, 1.0, 0.1)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(h) + x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self, self.output = SelfAttention(), Output(WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.output(self.self(x, mask)[0], x)


class Intermediate(nn.Module):
    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(WIDTH, 80), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(x))


class Block(nn.Module):
    """BERT's block (Devlin et al. 2019, arXiv 1810.04805) under the attribute names of the transformers package."""

    def __init__(self, activation: Any = F.gelu) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = Attention(), Intermediate(activation), Output(80)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        h = self.attention(hidden_states, attention_mask)
        y = self.output(self.intermediate(h), h)
        return (y, torch.zeros(1)) if output_attentions else (y, None)  # type: ignore[return-value]


class Encoder(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layer = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.layer:
            x = block(x, mask)[0]
        return x


def packed(model: nn.Module, *inputs: Tensor) -> nn.Module:
    return bw.pack(bw.quantize(model.eval(), bw.RoundToNearest(bits=4), calibration=inputs[0]))


def assert_close(a: Tensor, b: Tensor) -> None:
    assert float((a - b).norm()) <= 5e-3 * float(b.norm())


@pytest.mark.parametrize("activation", [F.gelu, nn.GELU("tanh"), nn.ReLU()])
@torch.no_grad()
def test_bert_blocks(activation: Any) -> None:
    x = torch.randn(3, 6, WIDTH)
    model = packed(Encoder(Block(activation), Block(activation)), x)
    fused = fuse(model)
    assert [record.reason for record in fused.fusion.records] == [None, None]  # type: ignore[union-attr]
    assert all(isinstance(block, FusedBertLayer) for block in fused.layer)  # type: ignore[union-attr]
    assert_close(fused(x), model(x))
    mask = torch.zeros(3, 1, 1, 6)
    mask[0, ..., 4:] = -1e9
    assert_close(fused(x, mask), model(x, mask))
    assert not torch.equal(fused(x, mask), fused(x))
    assert torch.equal(copy.deepcopy(fused)(x), fused(x))
    block = fused.layer[0]  # type: ignore[index]
    assert block(x)[1] is None and block(x, None, output_attentions=True)[1] is not None


@torch.no_grad()
def test_bert_blocks_give_the_same_however_the_batch_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 6, WIDTH)
    fused = fuse(packed(Encoder(Block(), Block()), x))
    mask = torch.zeros(5, 1, 6, 6)
    mask[3, ..., 2:] = -1e9
    whole, masked = fused(x), fused(x, mask)
    repeated = fused(x, mask[3])
    assert not torch.equal(whole, masked)
    for items in (1, 2):
        monkeypatch.setattr("bantamweight.nn.transformer_blocks._CACHE_BYTES", items * 3 * 4 * 6 * WIDTH)
        assert torch.equal(fused(x), whole)
        assert torch.equal(fused(x, mask), masked)
        assert torch.equal(fused(x, mask[3]), repeated)
    assert fused(x[:0]).shape == (0, 6, WIDTH)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@torch.no_grad()
def test_torch_encoder_layers(norm_first: bool, activation: str) -> None:
    block = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, activation=activation, batch_first=True, norm_first=norm_first)
    x = torch.randn(3, 7, WIDTH)
    model = packed(nn.TransformerEncoder(block, 2, enable_nested_tensor=False), x)
    fused = fuse(model)
    assert all(isinstance(part, FusedEncoderLayer) for part in fused.layers)  # type: ignore[union-attr]
    assert_close(fused(x), model(x))
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    assert_close(fused(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding))
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    assert_close(fused(x, mask=causal, is_causal=True), model(x, mask=causal, is_causal=True))


@torch.no_grad()
def test_what_cannot_be_fused_stays_and_says_why() -> None:
    x = torch.randn(2, 4, WIDTH)
    model = packed(Encoder(Block(), Block(torch.sin), Block()), x)
    model.layer[2].output.dense = nn.Linear(80, WIDTH)  # type: ignore[index, union-attr]
    fused = fuse(model)
    kinds = [type(block).__name__ for block in fused.layer]  # type: ignore[union-attr]
    assert kinds == ["FusedBertLayer", "Block", "Block"]
    report = str(fused.fusion)
    assert "its activation" in report and "its output.dense is a Linear, not a PackedLinear" in report
    assert_close(fused(x), model(x))


class Scaled(Block):
    """Looks like BERT's block and is none."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, ...]:
        return (2 * super().forward(hidden_states, attention_mask)[0], None)  # type: ignore[return-value]


def test_refuses_with_a_sentence() -> None:
    x = torch.randn(2, 4, WIDTH)
    with pytest.raises(BantamweightError, match="no chain of them that can be fused; leave calibration out"):
        fuse(packed(Encoder(Block()), x), calibration=x)
    fused = fuse(packed(Encoder(Block()), x))
    with pytest.raises(BantamweightError, match="fused already"):
        fuse(fused)
    assert sum(isinstance(part, PackedLinear) for part in fused.modules()) == 6


@torch.no_grad()
def test_a_model_with_nothing_to_fuse_comes_back_as_it_was() -> None:
    x = torch.randn(2, 4, WIDTH)
    lone = packed(nn.Sequential(nn.Linear(WIDTH, 3)), x)
    fused: Any = fuse(lone)
    assert fused is not lone and fused.fusion.names == [] and "nothing to fuse" in str(fused.fusion)
    assert torch.equal(fused(x), lone(x))
    for model, reason in (
        (Encoder(Block()), "its attention.self.query is a Linear, not a PackedLinear"),
        (packed(Encoder(Scaled()), x), "gives other outputs"),
    ):
        fused = fuse(model)
        assert fused.fusion.names == [] and reason in str(fused.fusion)
        assert torch.equal(fused(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "build", [lambda: Block(), lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)]
)
@torch.no_grad()
def test_blocks_of_half_precision(build: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, WIDTH)
    model = packed(build(), x).to(dtype)
    fused: Any = fuse(model)
    assert isinstance(fused, FusedBertLayer | FusedEncoderLayer)
    ours, theirs = (y[0] if isinstance(y, tuple) else y for y in (fused(x.to(dtype)), model(x.to(dtype))))
    assert ours.dtype is dtype
    assert float((ours.float() - theirs.float()).norm()) <= 0.03 * float(theirs.float().norm())


@torch.no_grad()
def test_a_block_with_hooks_keeps_them() -> None:
    x = torch.randn(2, 4, WIDTH)
    model: Any = packed(Encoder(Block(), Block()), x)
    calls: list[int] = []
    model.layer[1].intermediate.dense.register_forward_hook(lambda *_: calls.append(1))
    fused: Any = fuse(model)
    assert fused.fusion.names == ["layer.0"] and "intermediate.dense has hooks" in str(fused.fusion)
    fused(x)
    assert calls == [1]


@torch.no_grad()
def test_a_block_under_two_names_is_fused_once_and_everywhere() -> None:
    x = torch.randn(2, 4, WIDTH)
    block = Block()
    model: Any = packed(Encoder(block, block), x)
    fused: Any = fuse(model)
    assert fused.layer[0] is fused.layer[1] and isinstance(fused.layer[0], FusedBertLayer)
    assert_close(fused(x), model(x))
