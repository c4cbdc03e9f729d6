"""Transformer blocks whose packed layers run in a few calls."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..errors import BantamweightError
from ..ops.attention import attention
from .chain_finder import is_plain
from .fused import ACTIVATIONS, PackedChain, PackedFFN, PackedLinears, Stage, in_graph
from .packed import PackedLinear

_CACHE_BYTES = 2 << 20  # of queries, keys and values at a time


def fused_block(block: nn.Module) -> nn.Module | None:
    """What runs in the place of a transformer block of packed layers; None if the module is no such block.

    nn.TransformerEncoderLayer: the feed-forward half with its layer norm becomes a `PackedFFN` (its attention reads a
    float weight and stays torch's). Blocks built as BERT's in the transformers package: query, key and value become
    `PackedLinears`, `ops.attention` follows, and everything after it, up to the block's output, is one `PackedChain`.
    In training mode, or asked for attention weights or a cache, a block runs as before.

    Raises:
        BantamweightError: it is such a block, and cannot be fused; the sentence, which starts with "its", says why.
    """
    make = _maker_of(block)
    if make is None:
        return None
    for name, part in block.named_modules():
        if not is_plain(part):
            raise BantamweightError(f"its {name or 'call'} has hooks or a forward of its own, which would not run")
    try:
        fused = make(block)
        _check_equal(block, fused)
    except BantamweightError:
        raise
    except Exception as error:  # of the block's own code, on an input that may not suit it
        raise BantamweightError(f"its class does not run on rows alone ({type(error).__name__}: {error})") from None
    return fused.train(block.training)


class FusedEncoderLayer(nn.Module):
    """nn.TransformerEncoderLayer whose feed-forward half, its layer norm included, is one call."""

    ffn: PackedFFN

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        linears = [_packed(layer.linear1, "linear1"), _packed(layer.linear2, "linear2")]
        self.layer = layer
        norm = layer.norm2 if isinstance(layer.norm2, nn.LayerNorm) else None
        if norm is None:
            raise BantamweightError(f"norm2 is a {type(layer.norm2).__name__}, not an nn.LayerNorm")
        ffn = PackedFFN(
            *linears,
            activation=_activation_name(layer.activation),
            residual=True,
            norm=norm,
            norm_first=layer.norm_first,
        )
        self.__dict__["ffn"] = ffn  # not a submodule: its layers are those of `layer`

    @property
    def self_attn(self) -> nn.Module:
        """Which nn.TransformerEncoder asks for batch_first."""
        return self.layer.self_attn

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        layer = self.layer
        if self.training:
            return layer(src, src_mask, src_key_padding_mask, is_causal)
        # As in the layer's own forward: masks of bool and float become float.
        masks: list[Tensor | None] = []
        for mask in (src_mask, src_key_padding_mask):
            if mask is not None and mask.dtype is torch.bool:
                mask = torch.zeros_like(mask, dtype=src.dtype).masked_fill_(mask, float("-inf"))
            masks.append(mask)
        if layer.norm_first:
            x = src + layer._sa_block(layer.norm1(src), *masks, is_causal=is_causal)
        else:
            x = layer.norm1(src + layer._sa_block(src, *masks, is_causal=is_causal))
        return self.ffn(x)

    def extra_repr(self) -> str:
        return repr(self.ffn)


class FusedBertLayer(nn.Module):
    """A block built as BERT's: three calls of the extension.

    `bfloat16` lets the products of attention round to bfloat16 where the CPU has AMX; set it to False for float32.
    """

    qkv: PackedLinears
    block: PackedChain
    bfloat16: bool = True

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, inner, output = layer.attention.self, layer.attention.output, layer.output
        if getattr(layer, "is_decoder", False) or hasattr(layer, "crossattention"):
            raise BantamweightError("it is a decoder's block")
        if getattr(attention, "position_embedding_type", "absolute") not in (None, "absolute"):
            raise BantamweightError("its attention has relative positions")
        names = ("query", "key", "value")
        qkv = PackedLinears([_packed(getattr(attention, name), f"attention.self.{name}") for name in names])
        block = PackedChain(
            [
                Stage(linear=_packed(inner.dense, "attention.output.dense"), residual="given", norm=inner.LayerNorm),
                Stage(
                    linear=_packed(layer.intermediate.dense, "intermediate.dense"),
                    activation=_activation_name(layer.intermediate.intermediate_act_fn),
                ),
                Stage(linear=_packed(output.dense, "output.dense"), residual=0, norm=output.LayerNorm),
            ]
        )
        self.layer = layer
        self.heads, self.head_size = int(attention.num_attention_heads), int(attention.attention_head_size)
        # Not submodules: their layers are those of `layer`.
        self.__dict__["qkv"], self.__dict__["block"] = qkv, block
        # transformers' versions return the hidden states alone or a tuple of them and what was not asked for.
        with torch.no_grad():
            returned = layer(torch.zeros(1, 1, qkv.in_features, dtype=_dtype_of(layer)))
        self._tuple = len(returned) if isinstance(returned, tuple) else 0

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        asked = any(arg is not None and arg is not False for arg in args)
        asked |= any(v is not None and v is not False for name, v in kwargs.items() if name != "cache_position")
        if asked or self.training:
            return self.layer(hidden_states, attention_mask, *args, **kwargs)
        run = self._run_eager if hidden_states.dtype is torch.float32 and not in_graph(hidden_states) else self._compose
        y = run(hidden_states, attention_mask)
        return (y, *(None,) * (self._tuple - 1)) if self._tuple else y

    def _run_eager(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Some items of the batch at a time, whose queries, keys and values stay in the L2 cache.

        And in the heap: memory for a whole batch's comes from the system, page by page, at every call.
        """
        batch, tokens, width = x.shape
        bytes_of_item = 3 * 4 * tokens * width
        items = max(1, _CACHE_BYTES // max(bytes_of_item, 1))
        y = torch.empty(x.shape, dtype=torch.float32, device="cpu")
        for first in range(0, batch, items):
            part = slice(first, first + items)
            q, k, v = self.qkv(x[part])
            own = mask[part] if mask is not None and mask.ndim == 4 and len(mask) == batch else mask
            context = attention(q, k, v, self.heads, own, bfloat16=self.bfloat16)
            self.block.run(context, x[part], out=y[part])
        return y

    def _compose(self, x: Tensor, mask: Tensor | None) -> Tensor:
        heads = (*x.shape[:-1], self.heads, self.head_size)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(x))
        context = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.block(context.transpose(1, 2).flatten(2), x)

    def extra_repr(self) -> str:
        return f"{self.qkv!r}, {self.block!r}"


def _maker_of(module: nn.Module) -> Callable[[Any], nn.Module] | None:
    if isinstance(module, nn.TransformerEncoderLayer):
        return FusedEncoderLayer
    paths = (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    )
    for path in paths:
        found: Any = module
        for part in path.split("."):
            found = getattr(found, "_modules", {}).get(part)
        if found is None:
            return None
    return FusedBertLayer


def _packed(layer: nn.Module, name: str) -> PackedLinear:
    if not isinstance(layer, PackedLinear):
        raise BantamweightError(f"its {name} is a {type(layer).__name__}, not a PackedLinear; quantize and pack it")
    if layer.activations != "int8":
        raise BantamweightError(f"its {name} takes {layer.activations} inputs, but blocks hand int8 rows on")
    return layer


def _activation_name(function: Callable[[Tensor], Tensor]) -> str:
    """Which of the extension's activations a function or module is, told by its values."""
    x = torch.linspace(-6, 6, 193)
    with torch.no_grad():
        y = function(x)
        for name, known in ACTIVATIONS.items():
            if isinstance(y, Tensor) and y.shape == x.shape and bool(((y - known(x)).abs() < 1e-5).all()):
                return name
    raise BantamweightError(f"its activation {function} is none of {', '.join(ACTIVATIONS)}")


def _check_equal(block: nn.Module, fused: nn.Module) -> None:
    """Refuses a fused block that computes something else: a subclass may have changed what happens between layers."""
    width = fused.ffn.in_features if isinstance(fused, FusedEncoderLayer) else fused.qkv.in_features  # type: ignore
    x = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(0)).to(_dtype_of(block))  # type: ignore
    was_training = block.training
    block.eval()
    fused.eval()
    if isinstance(fused, FusedBertLayer):
        fused.bfloat16 = False
    with torch.no_grad():
        a, b = block(x), fused(x)
    block.train(was_training)
    if isinstance(fused, FusedBertLayer):
        fused.bfloat16 = True
    a, b = (y[0] if isinstance(y, tuple) else y for y in (a, b))
    # A float that falls the other way at a rounding to int8 moves an output by a hundredth of a row's size, and the
    # single layers round every step between them to the dtype.
    tolerance = 0.01 + 4 * torch.finfo(x.dtype).eps
    if a.dtype is not b.dtype or float((a.float() - b.float()).norm()) > tolerance * float(a.float().norm()):
        raise BantamweightError(
            "the fused block gives other outputs, so it computes something else than its class says"
        )


def _dtype_of(block: nn.Module) -> torch.dtype:
    """Of the block's rows: its norms have the dtype that the model was given."""
    weights = (part.weight for part in block.modules() if isinstance(part, nn.LayerNorm))
    return next((weight.dtype for weight in weights if isinstance(weight, Tensor)), torch.float32)
