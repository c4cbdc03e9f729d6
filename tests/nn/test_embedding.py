"""The packed embedding equals the simulated one, and torch's own, to the last bit on every kernel."""

import copy

import pytest
import torch
from bantamweight import _C, QuantizedWeight, pack, read_header, save
from bantamweight import load as load_model
from bantamweight.errors import BantamweightError, FormatError, KernelError, UnsupportedLayerError
from bantamweight.nn import PackedEmbedding, SimulatedEmbedding, unpack
from bantamweight.ops import describe_embedding, lowbit_embedding, pack_embedding, unpack_embedding

KERNELS = [name for name, missing in _C.embedding_variants() if not missing]


def table(rows: int, dim: int, levels: int = 16, group_size: int | None = None, symmetric: bool = True):
    groups = -(-dim // (group_size or max(dim, 1)))
    codes = torch.randint(0, levels, (rows, dim), dtype=torch.uint8)
    zero = levels / 2 if symmetric else torch.randn(rows, groups)
    return QuantizedWeight.from_codes(codes, torch.rand(rows, groups), zero, group_size=group_size, levels=levels)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("levels", [3, 4, 7, 8, 16, 256])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equal_to_torch_on_the_dequantized_table(
    kernel: str, levels: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", kernel)
    for rows, dim, group_size in ((1, 1, None), (9, 100, 33), (5, 48, 16), (40, 384, None), (300, 17, None)):
        w = table(rows, dim, levels, group_size, symmetric)
        packed, simulated = PackedEmbedding.from_quantized(w), SimulatedEmbedding(w)
        assert packed.kernel == kernel and packed.quantized.equals(w)
        for shape in ((), (1,), (3, 5), (0,), (2, 0), (700,)):
            index = torch.randint(0, rows, shape)
            expected = torch.nn.functional.embedding(index, w.dequantize())
            assert torch.equal(packed(index), expected) and torch.equal(simulated(index), expected)
            assert torch.equal(packed(index.int()), expected)


def test_indices_of_any_strides_and_torchs_defaults() -> None:
    packed = PackedEmbedding(table(30, 24))
    index = torch.randint(0, 30, (6, 8))
    assert torch.equal(packed(index.T), packed(index.T.contiguous()))
    expected = packed(index)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(packed(index), expected) and packed(index).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_no_index_is_refused() -> None:
    packed = PackedEmbedding(table(30, 24))
    for bad in (-1, 30, 2**40):
        with pytest.raises(BantamweightError, match=rf"PackedEmbedding 30x24: index {bad} at position 2 is outside"):
            packed(torch.tensor([[0, 29], [bad, bad]]))
    with pytest.raises(BantamweightError, match=r"takes int64 or int32 indices, but torch.float32 came; convert"):
        packed(torch.zeros(2))
    with pytest.raises(BantamweightError, match=r"indices, but a list came"):
        packed([1, 2])  # type: ignore[arg-type]
    with pytest.raises(BantamweightError, match="padding_idx is 30, but must be one of the 30 rows"):
        PackedEmbedding(table(30, 24), padding_idx=30)


def test_from_float_keeps_the_padding_row_and_refuses_max_norm() -> None:
    layer = torch.nn.Embedding(10, 16, padding_idx=-1)
    simulated = SimulatedEmbedding.from_float(layer, table(10, 16))
    assert simulated.padding_idx == 9 and "10, 16, padding_idx=9, simulated W4" in repr(simulated)
    packed = pack(simulated)
    assert packed.padding_idx == 9 and f"padding_idx=9, packed W4 {packed.kernel}" in repr(packed)
    assert torch.equal(packed(torch.tensor([9])), simulated.weight[9:])  # whatever is stored, as in torch
    with pytest.raises(BantamweightError, match="a table of 9x16 came for an embedding of 10x16"):
        SimulatedEmbedding.from_float(layer, table(9, 16))
    with pytest.raises(UnsupportedLayerError, match=r"max_norm=1\.0 changes its rows"):
        SimulatedEmbedding.from_float(torch.nn.Embedding(10, 16, max_norm=1.0), table(10, 16))


def test_ops_round_trip_and_refuse() -> None:
    w = table(12, 40, 8, 16, symmetric=False)
    layout = pack_embedding(w)
    found = describe_embedding(layout)
    assert (found.num_embeddings, found.embedding_dim, found.bits, found.group_size) == (12, 40, 3, 16)
    assert unpack_embedding(layout, 8).equals(w)
    index = torch.randint(0, 12, (3, 4))
    assert torch.equal(lowbit_embedding(index, layout, 40), PackedEmbedding(w)(index))
    with pytest.raises(BantamweightError, match="embedding_dim is 41, but must be that of the packed table"):
        lowbit_embedding(index, layout, 41)
    with pytest.raises(KernelError, match=r"the embedding kernels of this machine are|^amx: "):
        pack_embedding(w, "amx")  # which no embedding needs
    with pytest.raises(KernelError, match="made by another version"):
        describe_embedding(layout[:100].clone())


def test_exported_and_copied() -> None:
    packed = PackedEmbedding(table(30, 24))
    index = torch.randint(0, 30, (4, 7))
    program = torch.export.export(packed, (index,))
    assert torch.equal(program.module()(index), packed(index))
    twin = copy.deepcopy(packed)
    assert torch.equal(twin(index), packed(index)) and twin._addresses[0] != packed._addresses[0]


class Tagger(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(50, 32, padding_idx=0)
        self.head = torch.nn.Linear(32, 5)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(index))


def test_saved_loaded_and_state_dict(tmp_path) -> None:
    net = Tagger()
    net.words = SimulatedEmbedding.from_float(net.words, table(50, 32, 3, 16))
    packed, index = pack(net), torch.randint(0, 50, (3, 9))
    assert [(r.name, r.scheme, r.reason) for r in packed.packing.layers] == [("words", "ternary-g16", None)]
    save(packed, tmp_path / "model.safetensors")
    record = read_header(tmp_path / "model.safetensors").layers["words"]
    assert (record.kind, record.shape, record.padding_idx) == ("embedding", (50, 32), 0)
    again = load_model(tmp_path / "model.safetensors", Tagger())
    assert isinstance(again.words, PackedEmbedding) and again.words.padding_idx == 0
    assert torch.equal(again(index), packed(index))
    back = unpack(packed)
    assert isinstance(back.words, SimulatedEmbedding) and back.words.quantized.equals(net.words.quantized)
    other = Tagger()
    other.words = PackedEmbedding(table(50, 32, 3, 16))
    other.load_state_dict(back.state_dict())
    assert torch.equal(other(index), packed(index))
    wrong = Tagger()
    wrong.words = torch.nn.Linear(32, 50)  # type: ignore[assignment]
    with pytest.raises(FormatError, match="layer 'words' is embedding 50x32, but the model's is linear 50x32"):
        load_model(tmp_path / "model.safetensors", wrong)
