"""`bantamweight sensitivity`, run as a user runs it."""

import json
import sys

import numpy as np
import pytest
import torch
from bantamweight.__main__ import main
from bantamweight.curvature import Sensitivity
from safetensors.torch import save_file
from torch import nn

NETWORK = """
from torch import nn

def make_model():
    print("made")
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
"""


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "net.py").write_text(NETWORK)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=generator.normal(size=(60, 1, 6, 6)).astype(np.float32), y=np.arange(60) % 3)
    return tmp_path


def arguments(files, *more):
    own = [f"--model={files}/net.py:make_model", f"--weights={files}/net.safetensors", f"--data={files}/data.npz"]
    return ["sensitivity", *own, f"--out={files}/out", "--subsets=2", "--fraction=0.5", "--threads=1", *more]


def test_writes_table_plan_and_report(files, capsys):
    pytest.importorskip("matplotlib")
    assert main(arguments(files, "--metric=omega", "--average-bits=4")) == 0
    out = capsys.readouterr().out
    assert "bits on average" in out and "made" not in out
    found = Sensitivity.from_json((files / "out/sensitivity.json").read_text())
    assert found.metric == "omega" and [layer.name for layer in found.layers] == ["0", "3"]
    assert str(found) in out
    planned = json.loads((files / "out/plan.json").read_text())
    assert sum(layer["bits"] * layer["weights"] for layer in planned["layers"]) <= 4 * (36 + 192)
    page = (files / "out/report.html").read_text()
    assert page.count("<table>") == 2 and "<td>192</td>" in page and "bits on average" in page
    assert page.count("<svg") == 4 and "<?xml" not in page and "evaluation mode" in page


def test_without_a_budget_there_is_no_plan(files):
    assert main(arguments(files, "--metric=ggn")) == 0
    assert sorted(p.name for p in (files / "out").iterdir()) == ["report.html", "sensitivity.json"]


def test_without_matplotlib_there_are_no_pictures(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(arguments(files, "--metric=trace")) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert "<svg" not in (files / "out/report.html").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--average-bits=1"], "needs at least 2 bits a weight"),
        (["--average-bits=nan"], "finite number above 0"),
        (["--fraction=0"], "fraction (0.0)"),
        (["--ignore=.*"], "no linear or 2d convolution layer"),
        (["--ignore=("], "no regular expression"),
        (["--weights=nothing.safetensors"], "does not exist"),
    ],
)
def test_bad_input_is_one_sentence(files, capsys, more, words):
    assert main(arguments(files, "--metric=ggn", *more)) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert words in err[-1] and not (files / "out").exists()


def test_needs_all_of_a_network_or_none(files, capsys):
    assert main(["sensitivity", f"--model={files}/net.py:make_model", f"--out={files}/out"]) == 2
    assert "--model, --weights and --data" in capsys.readouterr().err
    assert main(["sensitivity", f"--data={files}/data.npz", f"--out={files}/out"]) == 2
    assert "need --model" in capsys.readouterr().err
