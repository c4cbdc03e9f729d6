"""nn.MultiheadAttention on four plain linear layers (Vaswani et al. 2017, arXiv:1706.03762)."""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)

from .base import PreparedModule, bare, linear, parameter


class PreparedMultiheadAttention(PreparedModule, nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose weights are its children `query`, `key`, `value` and `out_proj`.

    torch's encoder layers ask `_qkv_same_embed_dim` before they read the packed weight in one call of their own; here
    it is False, so they call this module.

    Example:
        >>> attention = PreparedMultiheadAttention.prepare(nn.MultiheadAttention(8, 2))
        >>> x = torch.randn(5, 1, 8)
        >>> output, weights = attention(x, x, x)
        >>> output.shape, weights.shape
        (torch.Size([5, 1, 8]), torch.Size([1, 5, 5]))
    """

    kind = "multihead_attention"
    replaces = nn.MultiheadAttention
    parameters_of = ()
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear

    @classmethod
    def why_not(cls, module: nn.MultiheadAttention) -> str | None:
        names = ("in_proj_weight",) if module._qkv_same_embed_dim else _SEPARATE
        if any(module._parameters.get(name) is None for name in names):
            return "its weights are made anew at every call; make them plain with settle_weights first"
        if not isinstance(module.out_proj, nn.Linear):
            return f"its out_proj is a {type(module.out_proj).__name__}, not an nn.Linear"
        return None

    @classmethod
    def prepare(cls, module: nn.MultiheadAttention) -> Self:
        new: Any = bare(cls, module)
        packed, bias = module.in_proj_weight, module.in_proj_bias
        weights: Any = [getattr(module, name) for name in _SEPARATE]
        if packed is not None:
            weights = [parameter(part, like=packed) for part in packed.detach().chunk(3)]  # type: ignore[arg-type]
        biases: Any = [None] * 3
        if bias is not None:
            biases = [parameter(part, like=bias) for part in bias.detach().chunk(3)]  # type: ignore[arg-type]
        new.query, new.key, new.value = (linear(*pair) for pair in zip(weights, biases, strict=True))
        new.out_proj = module.out_proj
        new.bias_k, new.bias_v = module.bias_k, module.bias_v
        new._qkv_same_embed_dim = False
        return new

    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        weights = (self.query.weight, self.key.weight, self.value.weight)
        return torch.cat(weights) if self.kdim == self.vdim == self.embed_dim else None

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        biases = (self.query.bias, self.key.bias, self.value.bias)
        return None if any(bias is None for bias in biases) else torch.cat(biases)

    @property
    def q_proj_weight(self) -> Tensor:  # type: ignore[override]
        return self.query.weight

    @property
    def k_proj_weight(self) -> Tensor:  # type: ignore[override]
        return self.key.weight

    @property
    def v_proj_weight(self) -> Tensor:  # type: ignore[override]
        return self.value.weight

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's; the projections are calls of the children."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise AssertionError("a prepared MultiheadAttention does not take nested tensors; pass a padded batch")
        batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)  # type: ignore[attr-defined]
        batch_dim = 0 if self.batch_first and batched else 1
        if not batched:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        _check_shapes(self, query, key, value)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        q, k, v = (
            self._heads(layer(x), batch_dim) for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        by_hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if by_hint else _whole_mask(attn_mask, key_padding_mask, q, k)
        k, v, mask = self._with_extra_keys(k, v, mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            attended = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, by_hint)
        joined = attended.permute((0, 2, 1, 3) if batch_dim == 0 else (2, 0, 1, 3)).flatten(2)
        output = self.out_proj(joined)
        return (output if batched else output.squeeze(1)), weights

    def _heads(self, x: Tensor, batch_dim: int) -> Tensor:
        """[batch, heads, length, size of a head] of the projected x."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.permute((0, 2, 1, 3) if batch_dim == 0 else (1, 2, 0, 3))

    def _with_extra_keys(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values that every query may attend to: the learned ones of add_bias_kv, then zeros."""
        for extra_k, extra_v in (
            (self.bias_k, self.bias_v),
            *([(k.new_zeros(self.embed_dim),) * 2] if self.add_zero_attn else []),
        ):
            if extra_k is None or extra_v is None:
                continue
            shape = (1, self.num_heads, 1, self.head_dim)
            k = torch.cat((k, extra_k.view(shape).expand(len(k), -1, -1, -1)), dim=2)
            v = torch.cat((v, extra_v.view(shape).expand(len(v), -1, -1, -1)), dim=2)
            mask = None if mask is None else F.pad(mask, (0, 1))
        return k, v, mask


_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def _check_shapes(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.shape[-1] != module.embed_dim:
        raise AssertionError(f"was expecting embedding dimension of {module.embed_dim}, but got {query.shape[-1]}")
    for x, size, name in ((key, module.kdim, "key"), (value, module.vdim, "value")):
        if x.shape[-1] != size:
            raise RuntimeError(f"was expecting a {name} of {size} features, but got {x.shape[-1]}")
    if key.shape[:2] != value.shape[:2]:
        raise AssertionError(f"key's sequence and batch dims {key.shape[:2]} do not match value's {value.shape[:2]}")


def _whole_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Both masks as one to add to the scores, which it broadcasts to: [batch or 1, heads or 1, queries or 1, keys]."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    padding = F._canonical_mask(  # type: ignore[attr-defined]
        mask=key_padding_mask,
        mask_name="key_padding_mask",
        other_type=None if attn_mask is None else attn_mask.dtype,
        other_name="attn_mask",
        target_type=q.dtype,
    )
    mask = F._canonical_mask(  # type: ignore[attr-defined]
        mask=attn_mask, mask_name="attn_mask", other_type=None, other_name="", target_type=q.dtype, check_other=False
    )
    if mask is not None:
        wanted = (queries, keys) if mask.dim() == 2 else (batch * heads, queries, keys)
        if mask.shape != wanted:
            raise RuntimeError(f"The shape of the {mask.dim()}D attn_mask is {mask.shape}, but should be {wanted}.")
        mask = mask[None, None] if mask.dim() == 2 else mask.view(batch, heads, queries, keys)
    if padding is not None:
        if padding.shape != (batch, keys):
            raise AssertionError(f"Expected key_padding_mask of shape {(batch, keys)}, but got {tuple(padding.shape)}")
        padding = padding[:, None, None]
        mask = padding if mask is None else mask + padding
    return mask
