import json

import pytest
import torch
from bantamweight.__main__ import main
from bantamweight.bench import linear


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(linear, "SHAPES", ((64, 48),))
    monkeypatch.setattr(linear, "ROWS", (1, 3))


def test_json_has_a_row_for_every_weight_and_peer(capsys):
    threads = torch.get_num_threads()
    assert main(["bench", "linear", "--peers", "torch", "--json", "--threads", "1"]) == 0
    assert torch.get_num_threads() == threads
    found = json.loads(capsys.readouterr().out)
    names = {row["name"] for row in found["rows"]}
    assert "torch fp32" in names
    best = linear.best_kernel()
    assert {f"ternary {best}", f"W2 {best}", f"W4 {best}", f"W8 {best}"} <= names
    assert {(row["in_features"], row["rows"], row["threads"]) for row in found["rows"]} == {(64, 1, 1), (64, 3, 1)}
    assert all(row["microseconds"] > 0 and row["limit"] > 0 and row["gops"] > 0 for row in found["rows"])


def test_without_peers_every_kernel_is_timed(capsys):
    assert main(["bench", "linear", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "64x48" in said and "torch fp32" not in said
    for kernel in linear.available_kernels():
        assert f"ternary {kernel}" in said


def test_a_missing_peer_is_named_and_left_out(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("BANTAMWEIGHT_GGML", str(tmp_path))
    assert main(["bench", "linear", "--peers", "torch,ggml", "--threads", "1"]) == 0
    said = capsys.readouterr()
    assert "torch fp32" in said.out and "ggml" not in said.out
    assert "kernels of the peers" in said.out
    assert [line for line in said.err.splitlines() if line.startswith("ggml is left out: ")]


def test_an_unknown_peer_is_refused(capsys):
    assert main(["bench", "linear", "--peers", "tensorrt"]) == 2
    assert "tensorrt" in capsys.readouterr().err
