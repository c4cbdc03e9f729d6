"""Blocks over tokens: recurrences, attention, convolutions in one dimension, tied tables."""

import torch
from network_blocks import Draw, Shape, block, evenly, evenly_table, linear, shaken
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


@block("tokens")
class Loop(nn.Module):
    """A recurrence of two linear layers, by hand."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.inputs, self.state = linear(shape[-1], 16), linear(16, 16)
        self.cell = nn.GRUCell(16, 16) if draw.pick("cell", True, False) else None

    def forward(self, x: Tensor) -> Tensor:
        h, states = x.new_zeros(x.shape[0], 16), []
        for at in range(x.shape[1]):
            h = torch.tanh(self.inputs(x[:, at]) + self.state(h))
            states.append(h if self.cell is None else self.cell(h, h))
        return torch.stack(states, 1)


@block("tokens")
class Recurrent(nn.Module):
    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        both = draw.pick("bidirectional", False, True)
        kind = draw.pick("kind", nn.LSTM, nn.GRU, nn.RNN)
        layers = draw.pick("layers", 1, 2)
        self.recurrent = kind(shape[-1], 16, num_layers=layers, batch_first=True, bidirectional=both)
        self.fc = linear(32 if both else 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.recurrent(x)[0])


@block("tokens")
class Attention(nn.Module):
    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.up = linear(shape[-1], 16)
        self.how = draw.pick("how", "module", "weights", "mask", "by hand")
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, bias=draw.pick("bias", True, False))
        self.qkv, self.out = linear(16, 48), linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.how == "by hand":
            q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.qkv(h).chunk(3, -1))
            return h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        mask = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(1) if self.how == "mask" else None
        answer, _ = self.attention(h, h, h, need_weights=self.how == "weights", attn_mask=mask)
        return h + self.out(answer)


@block("tokens")
class Encoder(nn.Module):
    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.up = linear(shape[-1], 16)
        options = {"activation": draw.pick("activation", "relu", "gelu"), "norm_first": draw.pick("first", True, False)}
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options)
        self.padded = draw.pick("padded", False, True)
        self.encoder = nn.TransformerEncoder(layer, 2) if draw.pick("stack", True, False) else layer

    def forward(self, x: Tensor) -> Tensor:
        if not self.padded:
            return self.encoder(self.up(x))
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[::2, -2:] = True
        return self.encoder(self.up(x), src_key_padding_mask=padding).masked_fill(padding[..., None], 0)


@block("tokens")
class Convolved(nn.Module):
    """Conv1d over tokens: strides, groups, padding modes, a BatchNorm1d after it."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        groups = draw.pick("groups", 1, 4)
        self.up = linear(shape[-1], 16)
        self.conv = evenly(
            nn.Conv1d(
                16,
                16,
                3,
                padding=draw.pick("padding", 1, "same", 0),
                groups=groups,
                padding_mode=draw.pick("mode", "zeros", "reflect", "circular"),
            )
        )
        self.norm = shaken(nn.BatchNorm1d(16)) if draw.pick("norm", True, False) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.up(x).transpose(1, 2))).relu().transpose(1, 2)


@block("tokens")
class BatchNormOverTokens(nn.Module):
    """BatchNorm1d on [n, t, d] has t channels, also where t and d are the same number."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.fc = linear(shape[-1], shape[-2])
        self.norm = shaken(nn.BatchNorm1d(shape[-2]))
        self.out = linear(shape[-2], 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.fc(x))))


@block("tokens")
class TiedHead(nn.Module):
    """Tokens' nearest rows of a table, then scores against the same table."""

    def __init__(self, draw: Draw, shape: Shape) -> None:
        super().__init__()
        self.embedding = evenly_table(24, shape[-1])
        self.fc = linear(shape[-1], shape[-1])
        self.how = draw.pick("tie", "function", "layer")
        self.head = linear(shape[-1], 24, bias=False)
        if self.how == "layer":
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device) % 24
        h = self.fc(x + self.embedding(positions))
        return F.linear(h, self.embedding.weight) if self.how == "function" else self.head(h)
