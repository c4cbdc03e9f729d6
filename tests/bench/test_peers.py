import importlib.util
from typing import Any

import pytest
import torch
from bantamweight.bench import peers
from bantamweight.bench.peers import open_vino
from bantamweight.bench.peers.peer import pack_codes, round_groups
from bantamweight.errors import BantamweightError


def source_of(out_features: int, in_features: int) -> peers.Source:
    generator = torch.Generator().manual_seed(0)
    return peers.Source(torch.randn(out_features, in_features, generator=generator) / in_features**0.5)


@pytest.mark.parametrize("library", peers.LIBRARIES)
def test_every_peer_multiplies_by_its_own_rounded_weight(library: str) -> None:
    if (why := peers.missing(library)) is not None:
        pytest.skip(why)
    source = source_of(64, 512)
    weight = source.weight
    found = list(peers.build([library], source, 1))
    assert found and len({peer.name for peer in found}) == len(found)
    for peer in found:
        assert peer.name.startswith(library)
        exact = peer.dequantize()
        # What each calls its weight is a rounding of ours: at 2 bits about 0.4 off, at 8 bits 0.01.
        assert 0.0 <= float((exact - weight).norm() / weight.norm()) < {2: 0.8, 4: 0.2, 8: 0.03}.get(peer.bits, 0.01)
        assert peer.bytes >= weight.numel() * min(peer.bits, 1.6) / 8
        for rows in (1, 5, 40):
            if peer.max_rows is not None and rows > peer.max_rows:
                continue
            x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows))
            call = peer.prepare(x)
            with torch.inference_mode():
                for _ in range(2):
                    y = call().float()
            expected = x @ exact.t()
            assert y.shape == expected.shape
            assert float((y - expected).norm() / expected.norm()) < 0.03, peer.name


def test_ggml_leaves_out_what_a_repacking_buffer_does_not_take() -> None:
    if (why := peers.missing("ggml")) is not None:
        pytest.skip(why)
    # 30 rows fill neither the eight rows of CPU_REPACK nor the tiles of AMX: loading such a weight would crash.
    names = [peer.name for peer in peers.build(["ggml"], source_of(30, 256), 1)]
    assert names == ["ggml TQ1_0", "ggml TQ2_0", "ggml Q2_K", "ggml Q4_0", "ggml Q4_K", "ggml Q8_0"]


def test_low_bit_peers_keep_their_bits() -> None:
    source = source_of(64, 256)
    for library in ("openvino", "ggml", "onnxruntime"):
        if peers.missing(library) is None:
            assert all(peer.bits <= 8 for peer in peers.build([library], source, 1))


def test_openvino_weights_of_another_type_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    if (why := peers.missing("openvino")) is not None:
        pytest.skip(why)

    def with_float_weights(rounded: Any, threads: int, precision: str) -> Any:
        openvino, op = importlib.import_module("openvino"), importlib.import_module("openvino.opset13")
        x = op.parameter([-1, 256], openvino.Type.f32)
        product = op.matmul(x, op.constant(rounded.dequantize().numpy()), False, True)
        return openvino.Core().compile_model(openvino.Model([op.result(product)], [x]), "CPU")

    monkeypatch.setattr(open_vino, "_compile", with_float_weights)
    assert {peer.bits for peer in open_vino.build(source_of(64, 256), 1)} == {32}


@pytest.mark.parametrize("library", [name for name in peers.LIBRARIES if name != "torch"])
def test_a_missing_library_is_left_out_with_a_reason(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("BANTAMWEIGHT_GGML", raising=False)
    why = peers.missing(library)
    assert why is not None and "not installed" in why and "\n" not in why
    assert list(peers.build([library], source_of(4, 4), 1)) == []


def test_a_folder_without_ggml_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("BANTAMWEIGHT_GGML", str(tmp_path))
    why = peers.missing("ggml")
    assert why is not None and str(tmp_path) in why and "libggml-base.so" in why


def test_choice_of_libraries() -> None:
    assert peers.choose("all") == list(peers.LIBRARIES)
    assert peers.choose(()) == []
    assert peers.choose(["openvino"]) == ["openvino"]
    with pytest.raises(BantamweightError, match=r"'tensorrt' is no peer; allowed are all.*onnxruntime"):
        peers.choose("torch,tensorrt")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_are_rounded_to_the_nearest_of_their_levels(bits: int) -> None:
    weight = source_of(6, 64).weight
    rounded = round_groups(weight, bits, 16)
    assert rounded is not None
    off = (rounded.dequantize() - weight).reshape(6, 4, 16).abs() / rounded.scale
    assert float(off.max()) <= 0.5 + 1e-3  # half a step: no value lies outside the levels
    assert int(rounded.codes.max()) < 1 << bits
    assert round_groups(weight, bits, 48) is None


@pytest.mark.parametrize("bits", [2, 4])
def test_packed_codes_come_back(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_codes(codes, bits)
    per_byte = 8 // bits
    back = torch.stack([packed >> (bits * place) & ((1 << bits) - 1) for place in range(per_byte)], dim=2).flatten(1)
    assert packed.shape == (3, 16 // per_byte) and torch.equal(back, codes)
