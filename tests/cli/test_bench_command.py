import json

import pytest
import torch
from bantamweight.__main__ import main
from bantamweight.bench import linear


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(linear, "SHAPES", ((64, 48),))
    monkeypatch.setattr(linear, "ROWS", (1, 3))


def test_json_has_a_row_for_every_kernel_and_peer(capsys):
    threads = torch.get_num_threads()
    assert main(["bench", "linear", "--peers", "--json", "--threads", "1"]) == 0
    assert torch.get_num_threads() == threads
    found = json.loads(capsys.readouterr().out)
    names = {row["name"] for row in found["rows"]}
    assert "torch fp32" in names
    for kernel in linear.available_kernels():
        assert {f"ternary {kernel}", f"W4 {kernel}"} <= names
    assert {(row["in_features"], row["rows"], row["threads"]) for row in found["rows"]} == {(64, 1, 1), (64, 3, 1)}
    assert all(row["microseconds"] > 0 for row in found["rows"])


def test_the_table_leaves_peers_out_unless_asked(capsys):
    assert main(["bench", "linear", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert "64x48" in said and "torch fp32" not in said
