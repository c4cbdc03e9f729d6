"""nn.EmbeddingBag on a plain table."""

import copy
from typing import Any

import bantamweight as bw
import pytest
import torch
from bantamweight.nn.prepare import prepare
from torch import nn


def both(mode: str, **options: Any) -> tuple[Any, Any]:
    reference = nn.EmbeddingBag(12, 5, mode=mode, **options).eval()
    prepared = copy.deepcopy(reference)
    assert set(prepare(prepared).records) == {""}
    return reference, prepared


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 3, -1])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
@torch.no_grad()
def test_bags(mode: str, padding: int | None, index: torch.dtype) -> None:
    ids = torch.tensor([1, 3, 11, 3, 3, 0, 5, 11], dtype=index)
    for last in (False, True):
        reference, prepared = both(mode, padding_idx=padding, include_last_offset=last)
        nn.init.normal_(reference.weight)
        prepared.table.weight.copy_(reference.weight)
        for starts in ([0, 2, 5], [0, 0, 3, 3, 8], [0]):
            offsets = torch.tensor([*starts, 8] if last else starts, dtype=index)
            torch.testing.assert_close(prepared(ids, offsets), reference(ids, offsets))
            if mode == "sum":
                weights = torch.randn(8)
                got = prepared(ids, offsets, per_sample_weights=weights)
                torch.testing.assert_close(got, reference(ids, offsets, per_sample_weights=weights))
        torch.testing.assert_close(prepared(ids.view(2, 4)), reference(ids.view(2, 4)))
    assert torch.equal(prepared.weight, reference.weight) and prepared.mode == mode


@torch.no_grad()
def test_no_indices_and_short_floats() -> None:
    reference, prepared = both("mean")
    none = torch.zeros(0, dtype=torch.int64)
    torch.testing.assert_close(prepared(none, torch.tensor([0, 0])), reference(none, torch.tensor([0, 0])))
    reference, prepared = reference.bfloat16(), prepared.bfloat16()
    ids = torch.randint(0, 12, (3, 400))
    torch.testing.assert_close(prepared(ids), reference(ids))


@torch.no_grad()
def test_what_torch_refuses() -> None:
    reference, prepared = both("mean")
    ids = torch.tensor([1, 2, 3])
    for module in (reference, prepared):
        with pytest.raises(ValueError, match="offsets has to be"):
            module(ids)
        with pytest.raises(ValueError, match="offsets has to be None"):
            module(ids[None], torch.tensor([0]))
        with pytest.raises(RuntimeError, match="has to be 0"):
            module(ids, torch.tensor([1]))
        with pytest.raises(NotImplementedError, match="only supported for mode"):
            module(ids, torch.tensor([0]), torch.ones(3))
        with pytest.raises(ValueError, match="same shape"):
            module(ids, torch.tensor([0]), torch.ones(2))
        with pytest.raises(ValueError, match="1D or 2D"):
            module(ids[None, None])


@torch.no_grad()
def test_a_bag_quantizes_as_a_table() -> None:
    net = nn.Sequential(nn.EmbeddingBag(50, 16), nn.Linear(16, 4)).eval()
    left = prepare(nn.EmbeddingBag(4, 4, max_norm=1.0))
    assert not left.records and "max_norm=1.0" in left.left[""]
    prepare(net)
    ids = torch.randint(0, 50, (64, 6))
    small = bw.quantize(net, bw.GPFQ(bits=8), calibration=ids, embeddings=bw.RoundToNearest(bits=8), progress=False)
    packed = bw.pack(small)
    assert {record.name for record in packed.packing.layers if record.kernel} == {"0.table", "1"}
    assert float((packed(ids) - net(ids)).norm() / net(ids).norm()) < 0.05
