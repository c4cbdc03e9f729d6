"""Attention against torch's."""

import itertools

import pytest
import torch
from bantamweight import _C
from bantamweight.errors import BantamweightError, KernelError
from bantamweight.ops import attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def torchs(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, scale: float | None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_equals_torchs(scale: float | None) -> None:
    torch.manual_seed(0)
    for batch, queries, keys, heads, size in itertools.product((1, 3), (1, 7, 40), (1, 33, 70), (1, 4), (8, 20, 32)):
        q = torch.randn(batch, queries, heads * size)
        k, v = torch.randn(batch, keys, 2 * heads * size).split(heads * size, dim=-1)
        masks = (
            None,
            torch.randn(batch, 1, 1, keys),
            torch.randn(queries, keys),
            torch.rand(batch, heads, queries, keys) < 0.7,
        )
        for mask in masks:
            wanted = torchs(q, k, v, heads, mask, scale)
            torch.testing.assert_close(attention(q, k, v, heads, mask, scale=scale), wanted, rtol=1e-5, atol=3e-6)


def test_leave_to_round_changes_little_or_nothing() -> None:
    torch.manual_seed(1)
    best = next(name for name, missing in _C.attention_variants() if not missing)
    q, k, v = torch.randn(2, 70, 3 * 128).split(128, dim=-1)
    exact, rounded = attention(q, k, v, 4), attention(q, k, v, 4, bfloat16=True)
    assert torch.equal(exact, rounded) == (best != "amx")
    assert float((rounded - exact).norm()) < 1e-2 * float(exact.norm())


def test_a_query_that_sees_no_key() -> None:
    q, k, v = torch.randn(3, 1, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    y = attention(q, k, v, 2, mask)
    assert not y[:, 0].any() and y[:, 1:].all()
    # The least float, which transformers' masks hold, hides only what stands beside something else.
    least = torch.full((5, 5), torch.finfo(torch.float32).min)
    torch.testing.assert_close(attention(q, k, v, 2, least), v.mean(1, keepdim=True).expand(1, 5, 8))


def test_two_threads_give_the_same_bits() -> None:
    q, k, v = torch.randn(2, 300, 3 * 64).split(64, dim=-1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = attention(q, k, v, 4)
        torch.set_num_threads(2)
        assert torch.equal(attention(q, k, v, 4), one)
    finally:
        torch.set_num_threads(threads)


def test_empty() -> None:
    assert attention(torch.randn(0, 3, 8), torch.randn(0, 4, 8), torch.randn(0, 4, 8), 2).shape == (0, 3, 8)
    assert attention(torch.randn(2, 0, 8), torch.randn(2, 4, 8), torch.randn(2, 4, 8), 2).shape == (2, 0, 8)
    assert not attention(torch.randn(2, 3, 8), torch.randn(2, 0, 8), torch.randn(2, 0, 8), 2).any()


def test_bad_input() -> None:
    x = torch.randn(2, 5, 8)
    with pytest.raises(BantamweightError, match=r"q is torch\.float64"):
        attention(x.double(), x, x, 2)
    with pytest.raises(BantamweightError, match="multiple of the heads"):
        attention(x, x, x, 3)
    with pytest.raises(BantamweightError, match="multiple of the heads"):
        attention(x, x[:, :4], x, 2)
    with pytest.raises(BantamweightError, match="requires a gradient"):
        attention(x, x.clone().requires_grad_(), x, 2)
    with pytest.raises(BantamweightError, match="broadcasts to"):
        attention(x, x, x, 2, torch.zeros(4, 4))
    with pytest.raises(BantamweightError, match="bool or float mask"):
        attention(x, x, x, 2, torch.zeros(5, 5, dtype=torch.int64))
    for mask in (torch.full((5, 5), torch.nan), torch.full((5, 5), torch.inf)):
        with pytest.raises(KernelError, match="NaN or infinity"):
            attention(x, x, x, 2, mask)
    bad = x.clone()
    bad[1, 4, 7] = torch.nan
    with pytest.raises(KernelError, match="NaN or infinity"):
        attention(bad, x, x, 2)
